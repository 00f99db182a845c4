"""The doctor: on this environment, and on broken ones. The page of known errors."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from clustr_mm import doctor
from clustr_mm.compat.safe_load import HAS_ALLOW_LIST
from clustr_mm.doctor import Concern, describe, hide_paths, main

ROOT = Path(__file__).parents[1]
FAQ = (ROOT / 'docs/faq.md').read_text()


def known(text):
    """Whether the page of known errors has a heading whose text is in this one."""
    headings = re.findall(r'^### `(.+)`$', FAQ, re.MULTILINE)
    assert len(headings) > 15
    return any(heading in text for heading in headings)


def run(*args, **variables):
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True,
    )  # fmt: skip


def test_this_environment():
    """All is well here, and the page holds nothing else."""
    done = run('-m', 'clustr_mm.doctor')
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r'^\[(.{4})\] (.+?): (.*)', done.stdout, re.MULTILINE)
    page = {name: (status, text) for status, name, text in found}
    assert len(page) == len(doctor.CHECKS) > 10
    may_warn = {'start-up file', 'versions'}
    may_warn |= set() if HAS_ALLOW_LIST else {'runner checkpoint'}
    for name, (status, text) in page.items():
        assert status == ' ok ' or name in may_warn, (name, text)
    assert f'torch: {torch.__version__}'.lower() in done.stdout.lower()
    assert f'clustr_mm {doctor.metadata.version("clustr_mm")}' in page['versions'][1]
    for toolbox, text in [
        ('mmdet', 'FasterRCNN runs, output 1 x 256 x 2 x 2'),
        ('mmseg', 'EncoderDecoder runs, output 1 x 19 x 18 x 23'),
        ('mmpose', 'TopdownPoseEstimator runs, output 1 x 133 x 24 x 24'),
        ('mmpretrain', 'ImageClassifier runs, output 1 x 1000'),
    ]:
        assert page[f'ClusTR in {toolbox}'][1] in (text, 'not installed')
    for line in done.stdout.splitlines()[:-1]:
        assert line.startswith(('[', '       ')), line
    assert re.fullmatch(
        r'0 failed, \d warnings; see docs/faq.md', done.stdout.splitlines()[-1]
    )
    assert os.path.expanduser('~') + '/' not in done.stdout
    assert sys.prefix not in done.stdout


TRAPS = """
import sys
import clustr_mm, mmcv, torch
from clustr_mm import doctor
from mmengine.config import utils

def show(check, *args):
    print(doctor.run_check(lambda: check(*args)))

class Missing:
    names = ['ftfy']

    def find_spec(self, name, path, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f'No module named {name!r}')

sys.meta_path.insert(0, Missing())
show(doctor.check_toolbox, 'mmseg')
real, mmcv.__version__ = mmcv.__version__, '2.2.0'
show(doctor.check_toolbox, 'mmdet')
mmcv.__version__ = real
utils.MODULE2PACKAGE.pop('clustr_mm', None)
show(utils._get_package_and_cfg_path, 'clustr_mm::mmdet/x.py')
show(doctor.MODELS.build, dict(type='NoModel'))
for name in ('pkg_resources', 'mmcv._ext'):
    Missing.names.append(name)
    sys.modules.pop(name, None)
    show(doctor.check_import, name)
"""


def test_known_traps():
    """What packages raise where things do not fit is found on the page."""
    done = run('-c', TRAPS)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("('")]
    expected = [
        "'ftfy'", 'MMCV==2.2.0 is used but incompatible',
        'does not support to load clustr_mm', 'NoModel is not in the',
        'pkg_resources', 'mmcv._ext',
    ]  # fmt: skip
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith("('fail', ") and text in line
        assert known(line.replace('NoModel', 'ClusTR')), line


@pytest.mark.parametrize(
    'check, text',
    [
        (lambda: 'fine', '[ ok ] x: fine'),
        (lambda: doctor.expect(1, 2), '[fail] x: ValueError: wrong result: 1 instead'),
        (lambda: sys.exit('libGL.so.1'), '[fail] x: SystemExit: libGL.so.1'),
    ],
)
def test_the_status_decides(monkeypatch, capsys, check, text):
    def warn():
        print('noise')
        raise Concern('odd')

    monkeypatch.setattr(doctor, 'CHECKS', dict(x=check, y=warn))
    failed = 'fail' in text
    assert main([]) == failed
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith(text) and second == '[warn] y: odd'
    assert last.startswith(f'{int(failed)} failed, 1 warnings')


def test_the_cause_is_told():
    """The registries hide it behind an error of their own."""
    try:
        try:
            raise ImportError("No module named\n'x'")
        except ImportError as error:
            raise KeyError('no model') from error
    except KeyError as error:
        lines = describe(error).splitlines()
    assert lines[0] == "KeyError: 'no model'"
    assert lines[1].strip() == "from ImportError: No module named 'x'"


def test_paths_are_hidden(monkeypatch):
    monkeypatch.setattr(doctor.Path, 'home', lambda: Path('/home/me'))
    monkeypatch.setattr(sys, 'prefix', '/home/me/venv')
    monkeypatch.setattr(sys, 'base_prefix', '/usr')
    text = 'in /home/me/venv/lib/x.py, "/home/me", /usr/lib, /home/mean and /usrx'
    hidden = 'in <env>/lib/x.py, "~", <python>/lib, /home/mean and /usrx'
    assert hide_paths(text) == hidden
    monkeypatch.setattr(doctor.Path, 'home', lambda: Path('/'))
    assert hide_paths('/home/me/x') == '/home/me/x'


@pytest.mark.parametrize(
    'installed, text',
    [
        (dict(mmcv='2.1.0', clustr_mm='1'), None),
        ({'mmcv': '2.1.0', 'mmcv-lite': '2.1.0', 'clustr_mm': '1'}, 'uninstall all'),
        (dict(mmcv='2.1.0'), 'pip install .'),
    ],
)
def test_versions(monkeypatch, installed, text):
    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor.metadata, 'version', version)
    if text is None:
        assert 'clustr_mm 1, no numpy' in doctor.check_versions()
    else:
        with pytest.raises(Concern, match=text):
            doctor.check_versions()


def test_a_driver_without_gpu(monkeypatch):
    monkeypatch.setattr(doctor.shutil, 'which', lambda name: name)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(Concern, match='there is a driver'):
        doctor.check_machine()


def test_clustering_on_a_gpu(monkeypatch):
    """Plain torch there is a warning with its reason, another result a failure."""
    real = doctor.dpc_knn
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.Tensor, 'cuda', lambda self: self + 0)
    monkeypatch.setattr(doctor, 'why_no_kernel', lambda device: 'no compiler')
    with pytest.raises(Concern, match='plain PyTorch.*no compiler'):
        doctor.check_clustering()
    monkeypatch.setattr(doctor, 'find_kernel', lambda tokens: print)
    assert doctor.check_clustering() == 'Triton on the GPU'
    calls = []

    def wrong(*args):
        calls.append(args)
        return tuple(x + (len(calls) > 1) for x in real(*args))

    monkeypatch.setattr(doctor, 'dpc_knn', wrong)
    with pytest.raises(ValueError, match='wrong result'):
        doctor.check_clustering()


def test_start_up(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.sysconfig, 'get_path', lambda name: str(tmp_path))
    monkeypatch.setattr(doctor, 'mmcv_ops_are_stand_in', lambda: False)
    assert doctor.check_start_up() == 'none, none needed'
    monkeypatch.setattr(doctor, 'mmcv_ops_are_stand_in', lambda: True)
    with pytest.raises(Concern, match='clustr_mm.compat on'):
        doctor.check_start_up()
    (tmp_path / 'clustr_mm.pth').touch()
    assert doctor.check_start_up() == 'in place'
    monkeypatch.setenv('CLUSTR_MM_COMPAT', '0')
    with pytest.raises(Concern, match='CLUSTR_MM_COMPAT=0'):
        doctor.check_start_up()


def test_issue_template_asks_for_it():
    template = (ROOT / '.github/ISSUE_TEMPLATE/bug_report.md').read_text()
    assert 'python -m clustr_mm.doctor' in template
