import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Adds ``clustr_mm/.mim``, where OpenMMLab packages have configs and tools.

    A wheel gets copies; in the checkout of an editable installation there are links.
    """

    CONTENT = ('configs', 'tools', 'model-index.yml')

    def run(self) -> None:
        package = Path(self.build_lib, 'clustr_mm')
        if self.editable_mode:
            package = Path('clustr_mm')
        else:
            # What is left of an earlier build may no longer exist in the sources.
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        folder = package / '.mim'
        folder.mkdir(exist_ok=True)
        for name in self.CONTENT:
            target = folder / name
            if self.editable_mode:
                target.unlink(missing_ok=True)
                target.symlink_to(Path('../..', name))
            elif Path(name).is_dir():
                ignore = shutil.ignore_patterns('__pycache__')
                shutil.copytree(name, target, ignore=ignore)
            else:
                shutil.copy(name, target)


setup(cmdclass={'build_py': BuildPy})
