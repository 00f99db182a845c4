"""What users of a wheel get."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SOURCES = shutil.ignore_patterns(
    *('.*', 'data', 'work_dirs', 'build', 'dist', '*.egg-info', '__pycache__')
)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """A folder into which the wheel of the source distribution is installed."""
    folder = tmp_path_factory.mktemp('packaging')
    # Builds leave files beside the sources. The data folder of the tests is one.
    shutil.copytree(ROOT, folder / 'source', ignore=NOT_SOURCES)
    shutil.copytree(ROOT / 'tests/data', folder / 'source/tests/data')

    def run(*command, cwd=folder):
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=cwd, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    # What an earlier build left of a module that is gone.
    stale = folder / 'source/build/lib/clustr_mm/models/stale.py'
    stale.parent.mkdir(parents=True)
    stale.touch()
    run('setup.py', '-q', 'build', cwd=folder / 'source')
    assert not stale.exists() and (stale.parent / 'clustr.py').exists()

    for hidden in ('.ci', '.github'):
        shutil.copytree(ROOT / hidden, folder / 'source' / hidden)
    run('setup.py', '-q', 'sdist', '-d', folder, cwd=folder / 'source')
    (archive,) = folder.glob('clustr_mm-*.tar.gz')
    pip = ('-m', 'pip', '--disable-pip-version-check')
    run(*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', folder, archive)
    (wheel,) = folder.glob('clustr_mm-*-py3-none-any.whl')
    run(*pip, 'install', '--no-deps', '--target', folder / 'site', wheel)
    return folder / 'site'


def test_the_source_distribution_has_all_sources(site):
    (path,) = site.parent.glob('clustr_mm-*.tar.gz')
    with tarfile.open(path) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    files = {
        str(file.relative_to(ROOT))
        for folder in (
            '.ci',
            '.github',
            'clustr_mm',
            'configs',
            'docs',
            'tests',
            'tools',
        )
        for file in (ROOT / folder).rglob('*')
        if file.is_file() and '__pycache__' not in file.parts
    }
    files |= {file.name for file in ROOT.iterdir() if file.suffix in ('.md', '.toml')}
    assert files <= names
    assert {'Makefile', 'requirements/lock.txt', 'setup.py', 'LICENSE'} <= names


def test_the_lock_and_the_licences_are_of_one_environment():
    lock = (ROOT / 'requirements/lock.txt').read_text()
    listed = (ROOT / 'docs/dependencies.md').read_text()
    pinned = re.findall(r'^([^#\s=]+)==(\S+)', lock, re.MULTILINE)
    named = re.findall(r'^\| ([\w.-]+) \| (\d\S*) \|', listed, re.MULTILINE)
    assert len(pinned) > 100

    def normal(pairs):
        return {(re.sub(r'[-_.]+', '-', name).lower(), v) for name, v in pairs}

    assert normal(pinned) ^ normal(named) == set()


def test_it_imports(site, tmp_path):
    code = 'import clustr_mm; print(clustr_mm.__file__, clustr_mm.__version__)'
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, env={'PYTHONPATH': str(site)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.split() == [str(site / 'clustr_mm/__init__.py'), '0.1.0']


def test_configs_and_tools_are_where_openmmlab_has_them(site):
    def files(folder):
        return sorted(
            str(path.relative_to(folder))
            for path in folder.rglob('*')
            if path.is_file() and '__pycache__' not in path.parts
        )

    for folder in ('configs', 'tools'):
        installed = site / 'clustr_mm/.mim' / folder
        assert files(installed) == files(ROOT / folder)
    from mmengine.config import Config

    config = 'mmseg/fpn_clustr-s_4xb4-80k_ade20k-512x512.py'
    assert (
        Config.fromfile(site / 'clustr_mm/.mim/configs' / config).model.backbone.arch
        == 'small'
    )


def test_the_start_up_file_is_beside_the_package(site):
    start_up = ROOT / 'clustr_mm/compat/clustr_mm.pth'
    assert (site / start_up.name).read_text() == start_up.read_text()
    assert len(start_up.read_text().splitlines()) == 1
