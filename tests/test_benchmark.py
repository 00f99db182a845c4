"""The benchmark, the presets that it compares, and the textbook's clustering."""

import json
import re
import sys
from pathlib import Path

import benchmark
import pytest
import torch
from backbones import Backbone, find_backbone
from mmengine.registry import MODELS
from naive import randn
from textbook import TextbookDPCKNN, textbook_dpc_knn
from torch import nn

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


@pytest.mark.parametrize('k', [3, 5, 200])
@pytest.mark.parametrize('seed', range(3))
def test_textbook_is_dpc_knn(seed, k):
    """On a line of integers with many ties, and for scattered tokens."""
    ties = torch.zeros(2, 60, 16)
    ties[..., 3] = (3 * randn(2, 60, seed=seed)).round()
    scattered = randn(2, 150, 24, seed=seed, dtype=torch.float64).float().double()
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


def test_config_of_a_toolbox():
    path = ROOT / 'configs/mmseg/fpn_clustr-t_4xb4-80k_ade20k-512x512.py'
    backbone = find_backbone(str(path))
    assert (backbone.name, backbone.scope) == (path.stem, 'mmseg')
    assert 'clustr_mm' in backbone.imports
    assert sum(p.numel() for p in backbone.build().parameters()) == 11_169_417


def test_nothing_asks_for_weights(tmp_path):
    path = tmp_path / 'peer.py'
    path.write_text(
        "default_scope = 'mmdet'\n"
        "model = dict(type='ResNet', depth=18, pretrained='https://none.invalid/a',"
        "init_cfg=dict(type='Pretrained', checkpoint='https://none.invalid/b'))"
    )
    model = find_backbone(str(path)).build()
    assert 'none.invalid' not in str(model.init_cfg)


@pytest.mark.parametrize('text', ['a = 1', 'model = dict(backbone=dict())', 'a ='])
def test_files_without_a_backbone(tmp_path, text):
    path = tmp_path / 'bad.py'
    path.write_text(text)
    with pytest.raises(ValueError, match=r'bad\.py'):
        find_backbone(str(path))


@MODELS.register_module()
class Watched(nn.Module):
    """Notes in which state it is called."""

    seen = []

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.layer.weight.register_hook(lambda grad: self.seen.append('backward'))

    def forward(self, x):
        y = self.layer(x)
        self.seen.append((self.training, torch.is_grad_enabled(), y.dtype, x.shape))
        return [y]


@pytest.mark.parametrize('mode', ['forward', 'train'])
@pytest.mark.parametrize('amp', ['off', 'bf16'])
def test_modes_and_amp(mode, amp):
    Watched.seen.clear()
    backbone = Backbone('w', dict(type='Watched'))
    call = benchmark.Pass(backbone, 2, (5, 7), mode, 'cpu', amp)
    call()
    train = mode == 'train'
    dtype = torch.float32 if amp == 'off' else torch.bfloat16
    assert Watched.seen[0] == (train, train, dtype, (2, 3, 5, 7))
    assert Watched.seen[1:] == ['backward'] * train
    assert call.model.layer.weight.grad is None


def test_operators_get_the_same_tokens(monkeypatch):
    seen = []
    for name in benchmark.OPERATORS:
        monkeypatch.setitem(benchmark.OPERATORS, name, lambda *args: seen.append(args))
        benchmark.make_operator(name, 2, 150, 8)()
    (first, counts), (second, _) = seen
    assert first.shape == (2, 150, 8) and counts == (2, 9)
    assert torch.equal(first, second)


def config(folder, name, **backbone):
    path = folder / f'{name}.py'
    backbone = dict(type='ClusTR', arch=ARCH, **backbone)
    path.write_text(f'model = dict(backbone={backbone!r})')
    return str(path)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the tool; gives its status, the rows by section and name, and the page."""

    def run(*argv, out=tmp_path / 'out'):
        options = ['--rounds', '2', '--warmup', '0', '--threads', '1']
        options += ['--device', 'cpu', '--out', str(out)]
        status = benchmark.main([*argv, *options])
        rows = json.loads((out / 'benchmark.json').read_text())['rows']
        page = (out / 'benchmark.md').read_text()
        assert page in capsys.readouterr().out
        return status, {(row['section'], row['name']): row for row in rows}, page

    before = torch.get_num_threads()
    yield run
    torch.set_num_threads(before)


def test_whole_run(run, tmp_path):
    """A case that fails, and one that needs too much memory, leave the others alone."""
    names = [
        config(tmp_path, 'plain'),
        config(tmp_path, 'windows', clusterer=dict(type='DPCKNN', window=16)),
        config(tmp_path, 'broken', drop_rate=7),
    ]
    status, rows, page = run(
        *('--backbones', *names, '--baseline', names[1], '--sizes', '32x64'),
        *('--operator', '1x16384x8', '--memory-limit', '0.75'),
    )
    assert status == 0
    assert [name for _, name in rows] == [
        *('textbook', 'dpc_knn', 'plain', 'windows', 'broken')
    ]
    plain, windows, broken = (
        rows['backbones', name] for name in ('plain', 'windows', 'broken')
    )
    assert broken['note'] == 'ValueError: drop_rate must be in [0, 1), got 7'
    assert 'ms' not in broken and 'MiB' not in broken
    assert plain['speed'] == windows['ms'] / plain['ms'] and windows['speed'] == 1
    assert plain['memory'] == plain['MiB'] / windows['MiB'] and windows['memory'] == 1
    assert plain['images/s'] == pytest.approx(1e3 / plain['ms'])
    # Three matrices of a GiB are needed.
    note = rows['operator', 'textbook']['note']
    assert note == 'skipped: needs more than 0.75 GiB of memory'
    assert rows['operator', 'dpc_knn']['ms'] > 0

    tables = [line.split('|') for line in page.splitlines() if line.startswith('|')]
    table = {line[1].strip(): [cell.strip() for cell in line] for line in tables}
    assert table['plain'][8] == f'{plain["speed"]:.2f}'
    assert 'speed / windows' in page and 'speed / textbook' in page
    assert 'drop_rate must be in' in page
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
    times = dict(
        fast=[9, 0.1, 0.2, 0.3, 0.4], slow=[9, 1, 1, 1, 5], late=[1, KeyError(3)]
    )
    times = {name: iter(values) for name, values in times.items()}

    def call(name):
        calls.append(name)
        passed = next(times[name])
        if isinstance(passed, Exception):
            raise passed
        now[0] += passed

    def probe(case, limit):
        return (lambda: call(case.row['name'])), dict(MiB=50.0)

    monkeypatch.setattr(benchmark, 'probe_cpu', probe)
    monkeypatch.setattr(benchmark, 'timer', lambda: now[0])
    row = dict(section='backbones', input='64x64', batch=2, mode='forward')
    cases = [benchmark.Case(dict(row, name=name), None) for name in times]
    options = ['--rounds', '4', '--warmup', '1', '--device', 'cpu']
    args = benchmark.parse_args([*options, '--out', str(tmp_path)])
    fast, slow, late = benchmark.measure(cases, args)
    assert calls == ['fast', 'slow', 'late'] * 2 + ['fast', 'slow'] * 3
    assert [fast['ms'], slow['ms']] == pytest.approx([250, 1000])
    assert [fast['±'], slow['±']] == pytest.approx([75, 500])
    assert [fast['images/s'], slow['images/s']] == pytest.approx([8, 2])
    assert late['note'] == 'KeyError: 3' and 'ms' not in late


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
        ('--sizes 0', "got '0'"),
        ('--sizes 1x2x3', "got '1x2x3'"),
        ('--operator 1x2', "--operator: must be like 1x16384x64, got '1x2'"),
        ('--backbones clustr-t --baseline swin-t', "clustr-t.*got 'swin-t'"),
        ('--backbones clustr-t clustr-t', 'different names'),
        ('--batch 0', "--batch: must be at least 1, got '0'"),
        ('--memory-limit 0', '--memory-limit: must be at least'),
        ('--device tpu', "cpu or cuda, got 'tpu'"),
        ('--mode fast', "invalid choice: 'fast'"),
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
