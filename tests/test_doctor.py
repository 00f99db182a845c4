"""The doctor: on this environment, and on broken ones."""

import json
import logging
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import mmengine
import pytest
import torch

import clustr_mm
from clustr_mm.compat.safe_load import HAS_ALLOW_LIST
from clustr_mm.doctor import Check, checks, records, run_checks, versions
from clustr_mm.doctor.__main__ import format_check, main, quiet, summarise
from clustr_mm.doctor.records import describe, find_hint, guarded, hide_paths

ROOT = Path(__file__).resolve().parents[1]
MISSING = "No module named '{}'"


def run(code, **kwargs):
    return subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        **kwargs,
    )


def is_old(check):
    """Whether this torch is just too old for what is checked."""
    return check.name == 'runner checkpoint' and not HAS_ALLOW_LIST


def test_this_environment(capfd, monkeypatch):
    """All is well here, and nobody else writes to stdout."""

    def noise():
        print('noise')
        os.write(1, b'noise')
        logging.getLogger('noise').warning('noise')
        warnings.warn('noise', stacklevel=1)
        yield from run_checks()

    monkeypatch.setattr('clustr_mm.doctor.__main__.run_checks', noise)
    assert main(['--json']) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert err.count('noise') == 2
    assert result['ok'] is True
    found = {check['name']: check for check in result['checks']}
    assert len(found) == len(result['checks']) > 30
    for check in found.values():
        assert check['status'] == 'ok' or check['hint'], check
        assert (
            check['status'] == 'ok'
            or 'version' in check['name']
            or is_old(Check(**check))
        )
        assert check['status'] == 'warn' or check['hint'] is None, check
    for module in (torch, mmengine, clustr_mm):
        version = found[f'version of {module.__name__}']['text']
        assert version == module.__version__.split('+')[0]
    for toolbox, text in [
        ('mmdet', 'FasterRCNN runs, output '),
        ('mmseg', 'EncoderDecoder runs, output 1 x 19 x 18 x 23'),
        ('mmpose', 'TopdownPoseEstimator runs, output 1 x 133 x 24 x 24'),
        ('mmpretrain', 'ImageClassifier runs, output 1 x 1000'),
    ]:
        assert found[f'ClusTR in {toolbox}']['text'].startswith(text)
    if clustr_mm.compat.mmcv_ops_are_stand_in():
        text = found['mmcv operators']['text']
        assert 'nms, roi_align' in text and 'NotImplementedError' in text
        assert 'from the start' in found['stand-in at start']['text']
    assert os.path.expanduser('~') + '/' not in out and sys.prefix not in out

    checks_ = [Check(**check) for check in result['checks']]
    text = '\n'.join(map(format_check, checks_))
    assert '[ ok ] version of mmengine: 0' in text
    assert summarise(checks_).startswith('0 failed, ')


def test_known_traps():
    """What the toolboxes really raise in environments that do not fit."""
    done = run(
        """
import importlib, json, sys
from dataclasses import asdict
from functools import partial
import mmcv
from clustr_mm.doctor import checks
from clustr_mm.doctor.records import guarded
from clustr_mm.doctor.__main__ import quiet

def check(toolbox):
    return guarded(toolbox, partial(checks.check_toolbox, toolbox))

with quiet():
    sys.modules['ftfy'] = None
    results = [check('mmseg')]
    sys.modules['mmpose.version'] = None  # an import error that registries swallow
    results += [check('mmpose')]
    real, mmcv.__version__ = mmcv.__version__, '2.2.0'
    results += [check('mmdet')]
    mmcv.__version__ = real
    sys.modules['pkg_resources'] = None
    results += [check('mmpretrain'), guarded('x', checks.check_pkg_resources)]
print(json.dumps([asdict(check) for check in results]))

import runpy
sys.argv = ['doctor', '--help']
runpy.run_module('clustr_mm.doctor', run_name='__main__')
"""
    )
    assert done.returncode == 0, done.stderr
    results, usage = done.stdout.split('\n', 1)
    assert usage.startswith('usage: python -m clustr_mm.doctor')
    for result, text, hint in zip(
        json.loads(results),
        ['import of ftfy', 'mmpose.version', 'MMCV==2.2.0', *['pkg_resources'] * 2],
        ['pip install ftfy regex', '', 'mmcv-lite==2.1.0', *['"setuptools<81"'] * 2],
        strict=True,
    ):
        assert result['status'] == 'fail'
        assert text in result['text'] and hint in (result['hint'] or ''), result


@pytest.mark.parametrize(
    ('error', 'hint'),
    [
        (RuntimeError('operator torchvision::nms does not exist'), 'not a pair'),
        (OSError('torchvision/_C.so: undefined symbol: _ZN3c10'), 'not a pair'),
        (ModuleNotFoundError(MISSING.format('mmcv._ext')), 'stand-in'),
        (ModuleNotFoundError(MISSING.format('regex')), 'ftfy regex'),
        (ModuleNotFoundError(MISSING.format('chumpy')), '--no-build-isolation'),
        (ModuleNotFoundError(MISSING.format('pkg_resources')), 'setuptools<81'),
        (
            AttributeError("module 'pkgutil' has no attribute 'ImpImporter'. Did"),
            'setuptools>=69,<81',
        ),
        (ValueError('numpy.dtype size changed, may indicate ...'), 'numpy<2'),
        (ImportError('numpy.core.multiarray failed to import'), 'numpy<2'),
        (ImportError('libGL.so.1: cannot open shared object file'), 'headless'),
        (
            AssertionError('MMEngine==1.0.0 is used but incompatible.'),
            'mmengine==0.10.7',
        ),
        (
            NotImplementedError("mmcv operator 'ball_query' is not available: x"),
            'mmcv==2.1.0',
        ),
        (RuntimeError('Unsupported global: GLOBAL x.HistoryBuffer'), 'import clustr'),
        (RuntimeError('out of memory'), None),
        (ValueError('no regex fits'), None),
    ],
)
def test_hints_by_symptom(error, hint):
    found = find_hint(error)
    assert found is None if hint is None else hint in found
    # The cause counts, not what others made of it.
    outer = KeyError('FPN is not in the registry')
    outer.__cause__ = error
    assert find_hint(outer) == found


def test_errors_become_results():
    def exits():
        raise SystemExit('libGL.so.1: cannot open')

    check = guarded('x', exits)
    assert (check.name, check.status) == ('x', 'fail')
    assert check.text == 'SystemExit: libGL.so.1: cannot open'
    assert 'headless' in check.hint
    assert guarded('x', lambda: Check('y', 'ok', 'z')) == Check('y', 'ok', 'z')
    assert len(describe(ValueError('a\n' * 999))) == 300
    assert '\n' not in describe(ValueError('a\n' * 999))
    with pytest.raises(KeyboardInterrupt):
        guarded('x', lambda: (_ for _ in ()).throw(KeyboardInterrupt()))


def test_paths_are_hidden(monkeypatch):
    monkeypatch.setattr(records.Path, 'home', lambda: Path('/home/me'))
    monkeypatch.setattr(sys, 'prefix', '/home/me/venv')
    monkeypatch.setattr(sys, 'base_prefix', '/usr')
    text = 'in /home/me/venv/lib/x.py, "/home/me", /usr/lib, /home/mean and /usrx'
    hidden = 'in <env>/lib/x.py, "~", <python>/lib, /home/mean and /usrx'
    assert hide_paths(text) == hidden
    monkeypatch.setattr(records.Path, 'home', lambda: Path('/'))
    assert hide_paths('/home/me/x') == '/home/me/x'


def test_versions(monkeypatch):
    def check(module, **owners):
        owners = {name.replace('_', '-'): v for name, v in owners.items()}
        return versions.check_version(module, owners)

    assert check('mmseg', mmsegmentation='1.2.2').text == 'mmsegmentation 1.2.2'
    assert check('numpy', numpy='1.26.4').text == '1.26.4'
    assert check('clustr_mm', clustr_mm='0.1.0').text == '0.1.0'
    for fork in (
        check('mmseg', onedl_mmsegmentation='2.0'),
        check('mmseg', onedl_mmsegmentation='2.0', mmsegmentation='1.2.2'),
    ):
        assert fork.status == 'warn' and 'OneDL' in fork.hint
    both = check('mmcv', mmcv='2.1.0', mmcv_lite='2.1.0')
    assert both.status == 'warn' and 'overwrite each other' in both.hint
    cv2 = dict(opencv_python='4.11.0', opencv_python_headless='4.11.0')
    assert check('cv2', **cv2) == Check(
        'version of cv2', 'ok', 'opencv-python 4.11.0, opencv-python-headless 4.11.0'
    )
    cv2['opencv_python'] = '4.12.0'
    assert check('cv2', **cv2).status == 'warn'

    assert check('no_such_module') == Check(
        'version of no_such_module', 'ok', 'not installed'
    )
    # Found beside the working directory, say; other directories do not see it.
    check = check('clustr_mm')
    assert check.status == 'warn' and 'pip install .' in check.hint


def test_damaged_records(tmp_path, monkeypatch):
    """Folders that an interrupted uninstallation leaves."""
    for name in ('numpy-1.26.3', 'torch-2.0.0'):
        (tmp_path / f'{name}.dist-info').mkdir()
    (tmp_path / 'torch-2.0.0.dist-info/top_level.txt').write_text('torch\n')
    monkeypatch.syspath_prepend(tmp_path)
    owners = versions.find_distributions()
    for module in ('numpy', 'torch'):
        check = versions.check_version(module, owners[module])
        assert check.status == 'warn' and 'delete it' in check.hint
    check = versions.check_version('mmengine', owners['mmengine'])
    assert check.status == 'ok'


def test_missing_packages_are_no_failures(monkeypatch):
    for module in (checks, versions):
        monkeypatch.setattr(module, 'is_installed', lambda name: False)
    monkeypatch.setattr(checks, 'mmcv_ops_are_stand_in', lambda: False)
    monkeypatch.setattr(checks, 'find_distributions', dict)
    results = list(run_checks())
    assert all(check.status == 'ok' or is_old(check) for check in results)
    absent = [c.name for c in results if c.text.endswith('not installed')]
    for name in ['mmdet', 'mmpose', 'mmcv', 'cv2']:
        assert f'version of {name}' in absent
    for name in ['mim', 'OpenCV', 'mmcv operators', 'torchvision', 'ClusTR in mmseg']:
        assert name in absent

    monkeypatch.setattr(checks, 'mmcv_ops_are_stand_in', lambda: True)
    check = checks.check_torchvision()
    assert check.status == 'warn' and torch.__version__ in check.hint


def test_gpu(monkeypatch):
    def see(driver, *names):
        monkeypatch.setattr(checks, 'read_driver', lambda: driver)
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: bool(names))
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: len(names))
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda i: names[i])
        return checks.check_gpu()

    check = see('580.1', 'H200', 'A100')
    assert check.status == 'ok' and check.hint is None
    assert check.text.endswith('driver 580.1, 2 seen: H200, A100')
    check = see('580.1')
    assert check.status == 'warn' and 'CUDA_VISIBLE_DEVICES' in check.hint
    check = see(None)
    assert check.status == 'ok' and '--launcher pytorch' in check.text
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert 'built without CUDA' in see(None).text


def test_driver(monkeypatch, tmp_path):
    tool = tmp_path / 'nvidia-smi'
    tool.write_text('#!/bin/sh\necho 580.1\necho 580.1\n')
    tool.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
    assert checks.read_driver() == '580.1'
    tool.write_text('#!/bin/sh\necho no devices\nexit 9\n')
    assert checks.read_driver() is None
    monkeypatch.setenv('PATH', '/nowhere')
    assert checks.read_driver() is None


def test_wrong_results_are_failures(monkeypatch):
    real = checks.dpc_knn
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.Tensor, 'cuda', lambda self: self + 0)
    monkeypatch.setattr(checks, 'why_no_kernel', lambda device: 'no compiler')
    check = checks.check_clustering()
    assert check.status == 'warn' and 'no compiler' in check.hint
    monkeypatch.setattr(checks, 'find_kernel', lambda tokens: print)
    check = checks.check_clustering()
    assert (check.status, check.text) == ('ok', 'Triton on the GPU')
    calls = []

    def wrong(*args):
        calls.append(args)
        return tuple(x + (len(calls) > 1) for x in real(*args))

    monkeypatch.setattr(checks, 'dpc_knn', wrong)
    assert checks.check_clustering().status == 'fail'
    assert checks.expect('x', 'y', [1], [1]) == Check('x', 'ok', 'y')
    assert '[0] instead of [1]' in checks.expect('x', 'y', [0], [1]).text


def test_start_up(monkeypatch):
    finder = type('StandInFinder', (), {})
    monkeypatch.setattr(checks, 'mmcv_ops_are_stand_in', lambda: True)
    monkeypatch.setattr(checks, 'is_installed', lambda name: True)
    monkeypatch.setattr(sys, 'meta_path', [finder()])
    finder.__module__ = '_clustr_mm_finder'
    assert checks.check_start_up().status == 'ok'
    finder.__module__ = 'clustr_mm.compat.finder'
    check = checks.check_start_up()
    assert check.status == 'warn' and 'clustr_mm.pth' in check.hint
    monkeypatch.setattr(checks, 'mmcv_ops_are_stand_in', lambda: False)
    assert checks.check_start_up() == Check('stand-in at start', 'ok', 'not needed')


def test_operators_of_a_stand_in():
    module = types.ModuleType('mmcv._ext')
    for name in ('nms', 'roi_forward', 'roi_backward_input', '_own', 'get_version'):
        function = types.FunctionType(
            (lambda: None).__code__, {'__name__': 'mmcv._ext'}
        )
        setattr(module, name, function)
    module.imported = describe
    assert checks.list_operators(module) == ['nms', 'roi']


def test_failure_is_the_exit_status(capsys, monkeypatch):
    results = [
        Check('a', 'fail', 'ImportError: x', 'do this'),
        Check('b', 'warn', 'odd'),
        Check('c', 'ok', 'fine'),
    ]
    monkeypatch.setattr('clustr_mm.doctor.__main__.run_checks', lambda: iter(results))
    assert main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        '[fail] a: ImportError: x',
        '       -> do this',
        '[warn] b: odd',
        '[ ok ] c: fine',
        '1 failed, 1 warnings',
    ]
    del results[0]
    assert main(['--json']) == 0
    assert json.loads(capsys.readouterr().out)['ok'] is True


def test_stdout_comes_back(capfd, caplog):
    with (
        warnings.catch_warnings(record=True) as seen,
        pytest.raises(ValueError),
        quiet(),
    ):
        warnings.warn('noise', stacklevel=1)
        logging.getLogger('noise').warning('noise')
        raise ValueError
    assert not seen and not caplog.records
    os.write(1, b'one ')
    print('two')
    assert capfd.readouterr().out == 'one two\n'
    assert not logging.root.manager.disable


def test_issue_template_asks_for_it():
    template = (ROOT / '.github/ISSUE_TEMPLATE/bug_report.md').read_text()
    assert template.startswith('---\nname: ')
    assert 'python -m clustr_mm.doctor' in template
