"""The acceptance on a GPU, tried on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_acceptance as tool
import pytest
import torch

ROOT = Path(__file__).parents[1]
TOOL = ROOT / 'tools/analysis_tools/gpu_acceptance.py'
PATHS = (str(ROOT), str(TOOL.parent))  # what a run of the script has
MISSING = (
    *('mmdet', 'mmcv', 'timm', 'mmseg', 'torchvision', 'PIL'),
    *('tabulate', 'matplotlib', 'skimage'),
)

#: Stands in for an environment of torch and mmengine alone.
BARE = f"""
import runpy, sys
class Finder:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *args):
        hidden = name.split('.')[0] in {MISSING}
        return None if hidden else self.finder.find_spec(name, *args)
sys.meta_path[:] = map(Finder, sys.meta_path)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def read(folder):
    return json.loads((folder / 'gpu_acceptance.json').read_text())


def test_quick_with_torch_and_mmengine_alone(tmp_path):
    command = [sys.executable, '-c', BARE, TOOL, '--device', 'cpu', '--quick']
    done = subprocess.run(
        [*command, '--out', tmp_path],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(PATHS), OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = read(tmp_path)
    assert report.keys() == {'about', 'parts', 'complete'} and report['complete']
    about = {'date', 'card', 'quick', 'cuda', 'triton', 'commit', 'versions'}
    assert report['about'].keys() == about
    assert report['about']['versions']['torch'] == torch.__version__.split('+')[0]
    assert [part['part'] for part in report['parts']] == list(range(1, 9))
    skipped = 'skipped: needs a GPU'
    for part in report['parts']:
        assert part['status'] == (skipped if part['part'] in (3, 4) else 'passed')
        assert bool(part['rows']) == (part['status'] == 'passed')
        assert f'{part["part"]}. {part["title"]} ...' in done.stdout
    backbones = report['parts'][5]['rows']
    assert {row['backbone'] for row in backbones} == {'clustr-t', 'clustr-t-linear'}
    assert all(row['ms'] > 0 for row in backbones)
    assert (tmp_path / 'gpu_acceptance.md').read_text() in done.stdout


def test_failed_parts_do_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def breaks(run):
        """It breaks."""
        yield dict(what='before', ok=True)
        raise RuntimeError('on purpose')

    def is_wrong(run):
        """It is wrong."""
        yield dict(what='wrong', ok=False)

    def works(run):
        """It works."""
        yield dict(what='fine', ok=True)

    monkeypatch.setattr(tool, 'PARTS', [breaks, is_wrong, works])
    arguments = ['--device', 'cpu', '--quick', '--out', str(tmp_path)]
    assert tool.main(arguments) == 1
    report = read(tmp_path)
    assert [part['status'] for part in report['parts']] == [
        'failed',
        'failed',
        'passed',
    ]
    table = (tmp_path / 'gpu_acceptance.md').read_text()
    assert '| 1 | It breaks | failed |' in table
    assert 'RuntimeError: on purpose' in table and '| before | True |' in table
    assert tool.main([*arguments, '--parts', '3']) == 0
    assert [part['title'] for part in read(tmp_path)['parts']] == ['It works']
    capsys.readouterr()


def test_wrong_search_is_found(tmp_path, monkeypatch):
    def blind(queries, keys, width, limits):
        return torch.arange(width).expand(*queries.shape[:2], width)

    monkeypatch.setattr(tool.search, 'candidates', blind)
    arguments = ['--device', 'cpu', '--quick', '--parts', '1', '--out', str(tmp_path)]
    assert tool.main(arguments) == 1


def test_peers_of_timm_or_none(monkeypatch):
    calls = []

    def create_model(**kwargs):
        calls.append(kwargs)
        return torch.nn.Identity()

    def present(*names):
        find = lambda name: name in names or None  # noqa: E731
        monkeypatch.setattr(tool.importlib.util, 'find_spec', find)

    present('mmdet')
    note, peer = tool.find('pvtv2-b2', (64, 64))
    assert note == 'no mmdet or timm here: left out' and peer is None
    present('timm')
    fake = type(sys)('timm')
    fake.create_model = create_model
    monkeypatch.setitem(sys.modules, 'timm', fake)
    for name in tool.TIMM:
        note, peer = tool.find(name, (96, 64))
        assert note == 'timm' and isinstance(peer.build(), torch.nn.Identity)
    assert [call['model_name'] for call in calls] == list(tool.TIMM.values())
    assert calls[1]['img_size'] == (96, 64)
    assert not any('pretrained' in call for call in calls)
    present('mmdet', 'mmcv')
    assert tool.find('swin-t', (64, 64))[0] == 'mmdet'


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'PyTorch sees no GPU; --device cpu --quick tries the script'),
        (['--device', 'tpu'], "invalid choice: 'tpu'"),
        (['--device', 'cpu', '--parts', '9'], 'invalid choice: 9'),
        (['--device', 'cpu', '--out', __file__], f'cannot write to --out {__file__}'),
    ],
)
def test_refusals_take_a_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        tool.main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error and error.count('\n') == 1
