"""The benchmark, the presets that it compares, and the textbook's clustering."""

import json
import re
import sys
from pathlib import Path

import benchmark
import pytest
import torch
from backbones import find_backbone
from textbook import TextbookDPCKNN, textbook_dpc_knn

from clustr_mm.ops import dpc_knn

ROOT = Path(__file__).resolve().parents[1]
ARCH = dict(
    embed_dims=[16, 16, 32, 32],
    num_heads=[1, 1, 2, 2],
    mlp_ratios=[2, 2, 2, 2],
    depths=[2, 1, 1, 1],
    sr_ratios=[8, 4, 2, 1],
)
COUNTS = (4, 17)


def randn(*shape, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, **kwargs)


@pytest.mark.parametrize('k', [3, 5, 200])
def test_textbook_is_dpc_knn(k):
    """On a line of integers with many ties, and for scattered tokens."""
    ties = torch.zeros(2, 60, 16)
    ties[..., 3] = (3 * randn(2, 60)).round()
    scattered = randn(2, 150, 24, dtype=torch.float64).float().double()
    for tokens in (ties, scattered):
        found = textbook_dpc_knn(tokens, COUNTS, k)
        for a, b in zip(found, dpc_knn(tokens, COUNTS, k), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ('name', 'parameters'),
    [
        ('clustr-t-textbook', 11_169_417),
        ('clustr-s-linear', 22_177_941),
        ('pvtv2-b2', 24_849_856),
        ('swin-t', 27_520_698),
        ('resnet-50', 23_508_032),
        ('convnext-t', 27_821_472),
    ],
)
def test_presets(name, parameters):
    model = find_backbone(name).build()
    assert sum(p.numel() for p in model.parameters()) == parameters
    model.eval()
    with torch.no_grad():
        outs = model(torch.rand(1, 3, 64, 64))
    assert [out.shape[-1] for out in outs] == [16, 8, 4, 2]


def test_suffixes():
    model = find_backbone('clustr-b-w112-textbook').build()
    clusterer = model.stages[0].blocks[0].attn.clusterer
    assert type(clusterer) is TextbookDPCKNN and clusterer.window == 112
    linear = find_backbone('clustr-s-linear').cfg
    assert linear['clusterer'] == dict(type='KMeans')
    assert linear['max_clusters'] == 49
    assert find_backbone('clustr-t').cfg == dict(type='ClusTR', arch='t')


@pytest.mark.parametrize('name', ['clustr-x', 'clustr-s-w0', 'clustr-s-w', 'x.py'])
def test_unknown_names_list_the_presets(name):
    with pytest.raises(ValueError, match=f'{name!r}.*clustr-s-w224.*pvtv2-b2'):
        find_backbone(name)


def test_config_without_its_weights(tmp_path):
    path = tmp_path / 'peer.py'
    path.write_text(
        "default_scope = 'mmdet'\n"
        "model = dict(type='ResNet', depth=18, pretrained='https://none.invalid/a',"
        "init_cfg=dict(type='Pretrained', checkpoint='https://none.invalid/b'))"
    )
    backbone = find_backbone(str(path))
    assert (backbone.name, backbone.scope) == ('peer', 'mmdet')
    assert 'none.invalid' not in str(backbone.build().init_cfg)


@pytest.mark.parametrize('text', ['a = 1', 'model = dict(backbone=dict())', 'a ='])
def test_files_without_a_backbone(tmp_path, text):
    path = tmp_path / 'bad.py'
    path.write_text(text)
    with pytest.raises(ValueError, match=r'bad\.py'):
        find_backbone(str(path))


def config(folder, name, **backbone):
    path = folder / f'{name}.py'
    backbone = dict(type='ClusTR', arch=ARCH, **backbone)
    path.write_text(f'model = dict(backbone={backbone!r})')
    return str(path)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the tool; gives its status, the rows by section and name, and the page."""

    def run(*argv, out=tmp_path / 'out'):
        options = ['--rounds', '2', '--warmup', '0', '--device', 'cpu']
        options += ['--out', str(out)]
        status = benchmark.main([*argv, *options])
        rows = json.loads((out / 'benchmark.json').read_text())['rows']
        page = (out / 'benchmark.md').read_text()
        assert page in capsys.readouterr().out
        return status, {(row['section'], row['name']): row for row in rows}, page

    return run


#: A backbone, in a module of a user's own, that needs more memory than there is.
HUNGRY = """
import torch
from mmengine.registry import MODELS

@MODELS.register_module()
class Hungry(torch.nn.Module):
    def forward(self, x):
        return [torch.empty(2**45)]
"""


def test_whole_run(run, tmp_path, monkeypatch):
    """A case that fails, and one that needs too much memory, leave the others alone."""
    (tmp_path / 'hungry_module.py').write_text(HUNGRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    hungry = tmp_path / 'hungry.py'
    hungry.write_text(
        "custom_imports = dict(imports='hungry_module')\nmodel = dict(type='Hungry')"
    )
    names = [
        config(tmp_path, 'plain'),
        config(tmp_path, 'windows', clusterer=dict(type='DPCKNN', window=16)),
        config(tmp_path, 'broken', drop_rate=7),
        str(hungry),
    ]
    status, rows, page = run(
        *('--backbones', *names, '--baseline', 'windows', '--sizes', '32x64'),
        *('--mode', 'train', '--amp', 'bf16', '--operator', '1x64x8'),
    )
    assert status == 0
    assert [name for _, name in rows] == [
        *('textbook', 'dpc_knn', 'plain', 'windows', 'broken', 'hungry')
    ]
    plain, windows, broken, hungry = (
        rows['backbones', name] for name in ('plain', 'windows', 'broken', 'hungry')
    )
    assert broken['note'] == 'ValueError: drop_rate must be in [0, 1), got 7'
    assert 'ms' not in broken and 'MiB' not in broken
    pattern = r'skipped: needs more than [\d.e+]+ GiB of memory'
    assert re.fullmatch(pattern, hungry['note']) and 'ms' not in hungry
    assert plain['speed'] == windows['ms'] / plain['ms'] and windows['speed'] == 1
    assert plain['memory'] == plain['MiB'] / windows['MiB'] and windows['memory'] == 1
    assert plain['images/s'] == pytest.approx(1e3 / plain['ms'])

    tables = [line.split('|') for line in page.splitlines() if line.startswith('|')]
    table = {line[1].strip(): [cell.strip() for cell in line] for line in tables}
    assert table['plain'][8] == f'{plain["speed"]:.2f}'
    assert '## Backbones, train' in page and 'speed / windows' in page
    assert 'speed / textbook' in page and 'drop_rate must be in' in page
    picture = tmp_path / 'out/benchmark.png'
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_memory_is_that_of_the_case(run):
    # Freed at once, but this process has held it.
    torch.ones(3 * 2**27).sum()
    _, rows, _ = run('--operator', '1x4096x16')
    matrix = 4096**2 * 4 / 2**20
    assert 2 * matrix < rows['operator', 'textbook']['MiB'] < 6 * matrix


def test_rounds_take_turns(monkeypatch, tmp_path):
    """Median and spread of the rounds, without the warm-up."""
    calls, now = [], [0.0]
    times = dict(fast=iter([9, 0.1, 0.2, 0.3, 0.4]), slow=iter([9, 1, 1, 1, 5]))

    def call(name):
        calls.append(name)
        now[0] += next(times[name])

    def probe(case):
        return (lambda: call(case.row['name'])), dict(MiB=50.0)

    monkeypatch.setattr(benchmark, 'probe_cpu', probe)
    monkeypatch.setattr(benchmark, 'timer', lambda: now[0])
    row = dict(section='backbones', input='64x64', batch=2, mode='forward')
    cases = [benchmark.Case(dict(row, name=name), None) for name in times]
    options = ['--rounds', '4', '--warmup', '1', '--device', 'cpu']
    args = benchmark.parse_args([*options, '--out', str(tmp_path)])
    fast, slow = benchmark.measure(cases, args)
    assert calls == ['fast', 'slow'] * 5
    assert [fast['ms'], slow['ms']] == pytest.approx([250, 1000])
    assert [fast['±'], slow['±']] == pytest.approx([75, 500])
    assert [fast['images/s'], slow['images/s']] == pytest.approx([8, 2])


def test_interruption_keeps_what_is_there(run, monkeypatch, tmp_path):
    measure = benchmark.measure

    def interrupt(cases, args):
        if any(case.row['input'] == '96x96' for case in cases):
            raise KeyboardInterrupt
        return measure(cases, args)

    monkeypatch.setattr(benchmark, 'measure', interrupt)
    plain = config(tmp_path, 'plain')
    status, rows, _ = run('--backbones', plain, '--sizes', '32', '96', '64')
    assert status == 130
    assert [row['input'] for row in rows.values()] == ['32x32']


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ('--backbones vgg', 'vgg.*clustr-t, .*convnext-t'),
        ('--sizes 12y', "--sizes: must be like 800x1344, got '12y'"),
        ('--sizes 1x2x3', "got '1x2x3'"),
        ('--operator 1x2', "--operator: must be like 1x16384x64, got '1x2'"),
        ('--backbones clustr-t --baseline swin-t', "clustr-t.*got 'swin-t'"),
        ('--batch 0', "--batch: must be at least 1, got '0'"),
        ('--device tpu', 'device.*: tpu'),
    ],
)
def test_bad_arguments(capsys, tmp_path, argv, message):
    with pytest.raises(SystemExit) as stop:
        benchmark.main([*argv.split(), '--out', str(tmp_path / 'out')])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count('\n') == 1
    assert re.search(message, error)
    assert not (tmp_path / 'out').exists()


def test_a_missing_package_is_one_sentence(run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tabulate', None)
    with pytest.raises(
        SystemExit, match=r"needs tabulate .*: pip install 'clustr_mm\[t"
    ):
        run('--operator', '1x64x8')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(tmp_path):
    argv = ['--backbones', config(tmp_path, 'plain'), '--mode', 'both', '--sizes', '64']
    assert benchmark.main([*argv, '--device', 'cuda', '--out', str(tmp_path)]) == 0
    for row in json.loads((tmp_path / 'benchmark.json').read_text())['rows']:
        assert row['ms'] > 0 and row['MiB'] > 0
