"""What users of a wheel get."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from functools import partial
from importlib import metadata
from pathlib import Path

import mmengine
import pytest
from mmengine.utils import digit_version

import clustr_mm

ROOT = Path(__file__).parents[1]
NOT_SOURCES = shutil.ignore_patterns(
    *('.git', '.venv*', '.*_cache', '.hypothesis', '.mim', '__pycache__'),
    *('data', 'work_dirs', 'build', 'dist', '*.egg-info'),
)
CONFIG = 'mask-rcnn_clustr-t_fpn_1x_coco'


def run(*command, cwd, python=sys.executable, **variables):
    """Run Python with further environment variables; return what it wrote."""
    done = subprocess.run(
        [python, *map(str, command)],
        cwd=cwd, env=os.environ | variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder):
    return {
        str(path.relative_to(folder))
        for path in folder.rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """The source distribution, the wheel, and an environment where it is installed."""
    folder = tmp_path_factory.mktemp('packaging')
    pip = ('-m', 'pip', '--disable-pip-version-check')
    path = {}
    if digit_version(metadata.version('setuptools')) < digit_version('77'):
        # openmim's openxlab brings one that cannot read pyproject.toml.
        tool = ('--no-deps', '--target', folder / 'setuptools', 'setuptools>=77,<81')
        run(*pip, 'install', '-q', *tool, cwd=folder)
        path['PYTHONPATH'] = str(folder / 'setuptools')
    # Builds leave files beside the sources. The data folder of the tests is one.
    shutil.copytree(ROOT, folder / 'source', ignore=NOT_SOURCES)
    shutil.copytree(ROOT / 'tests/data', folder / 'source/tests/data')
    # What an earlier build left of a module that is gone.
    stale = folder / 'source/build/lib/clustr_mm/models/stale.py'
    stale.parent.mkdir(parents=True)
    stale.touch()
    hook = 'from setuptools import build_meta as b; b.build_{}(".."); '
    code = hook.format('sdist') + hook.format('wheel')
    run('-c', code, cwd=folder / 'source', **path)
    (wheel,) = folder.glob('clustr_mm-*-py3-none-any.whl')
    # In it are this environment's packages without what its start-up files add.
    run('-m', 'venv', '--without-pip', 'venv', cwd=folder)
    (site,) = folder.glob('venv/lib/python*/site-packages')
    (site / 'others.pth').write_text(f'{Path(mmengine.__file__).parents[1]}\n')
    run(*pip, 'install', '-q', '--no-deps', '--target', site, wheel, cwd=folder)
    return folder


@pytest.fixture
def python(built, tmp_path, monkeypatch):
    """Runs Python in that environment."""
    monkeypatch.delenv('PYTHONPATH', raising=False)
    return partial(run, cwd=tmp_path, python=built / 'venv/bin/python')


def test_the_source_distribution_has_all_sources(built):
    (path,) = built.glob('clustr_mm-*.tar.gz')
    with tarfile.open(path) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    ours = files(built / 'source')
    ours -= {
        file for file in ours if file.startswith(('build/', 'clustr_mm.egg-info/'))
    }
    assert len(ours) > 100
    assert ours - names == {'.gitignore'}


def test_the_wheel(built):
    (path,) = built.glob('clustr_mm-*.whl')
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (record,) = (name for name in names if name.endswith('dist-info/METADATA'))
        about = message_from_bytes(wheel.read(record))
    installed = next(built.glob('venv/lib/*/site-packages/clustr_mm/.mim'))
    for folder in ('configs', 'tools'):
        assert files(installed / folder) == files(ROOT / folder)
    assert (installed / 'model-index.yml').is_file()
    assert 'clustr_mm/py.typed' in names
    assert not [name for name in names if name.endswith('.pth') or 'stale' in name]
    assert {name.split('/')[0] for name in names} == {'clustr_mm', record.split('/')[0]}
    assert about['Version'] == clustr_mm.__version__
    citation = (ROOT / 'CITATION.cff').read_text()
    assert f'\nversion: {clustr_mm.__version__}\n' in citation
    extras = set(about.get_all('Provides-Extra'))
    assert extras >= {'mim', 'det', 'seg', 'pose', 'tools', 'test'}
    assert about['License-Expression'] == 'Apache-2.0'


def test_the_start_up_file(built, python, tmp_path):
    """The command puts it, it does its work, and nothing is left of it."""
    (site,) = built.glob('venv/lib/python*/site-packages')
    before, file = set(site.iterdir()), site / 'clustr_mm.pth'

    def command(*actions):
        code = 'from clustr_mm.compat.__main__ import main; import sys\n'
        code += 'for action in sys.argv[1:]: main([action])'
        return python('-c', code, *actions).splitlines()

    assert command('status', 'on', 'on', 'status') == [
        f'off: there is no {file}',
        *(f'on: wrote {file}', f'on: renewed {file}', f'on: {file}'),
    ]
    assert set(site.iterdir()) - before == {file}

    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = 'clustr_mm::mmdet/{CONFIG}.py'\nx = 1")
    code = (
        'import sys; assert "torch" not in sys.modules\n'
        'from mmengine.config import Config\n'
        'assert "clustr_mm" not in sys.modules\n'
        f'config = Config.fromfile({str(config)!r})\n'
        'print(config.model.backbone.arch, config.x)\n'
        'import mmcv.ops, clustr_mm; print(clustr_mm.__file__)\n'
        'kinds = [type(finder).__name__ for finder in sys.meta_path]\n'
        'print(kinds.count("StandInFinder"), kinds.count("ConfigsFinder"))'
    )
    package = site / 'clustr_mm/__init__.py'
    assert python('-c', code).splitlines() == ['tiny 1', str(package), '1 1']

    assert command('off', 'off') == [
        f'off: removed {file}',
        'off: there was no start-up file',
    ]
    assert set(site.iterdir()) == before
    code = 'import sys; print([str(f) for f in sys.meta_path if "clustr" in str(f)])'
    assert python('-c', code) == '[]\n'


def test_mim(python, tmp_path):
    pytest.importorskip('mim')
    code = (
        'from mim.cli import cli\n'
        'for line in ("search clustr_mm",\n'
        f'             "download clustr_mm --config {CONFIG} --dest ."):\n'
        '    cli(line.split(), standalone_mode=False)\n'
    )
    out = python('-c', code, HOME=str(tmp_path))
    for config in files(ROOT / 'configs'):
        name = Path(config).stem
        if '/clustr-' in config or '_clustr-' in config:
            is_own = any(w in name for w in ('toy', 'camvid', 'bccd'))  # no benchmark
            assert is_own or f'config id: {name}\n' in out, name
    saved = (tmp_path / f'{CONFIG}.py').read_text()
    assert "type='ClusTR'" in saved and "type='MaskRCNN'" in saved


def test_the_lock_is_of_the_pinned_versions():
    def pins(name):
        text = (ROOT / 'requirements' / name).read_text()
        found = re.findall(r'^([^#\s=]+)==([^\s\\]+)', text, re.MULTILINE)
        return {(re.sub(r'[-_.]+', '-', package).lower(), v) for package, v in found}

    pinned, locked = pins('versions.txt'), pins('lock.txt')
    assert len(locked) > 100
    # What only builds, and the other mmcv.
    assert {package for package, _ in pinned - locked} <= {'mmcv', 'wheel'}
