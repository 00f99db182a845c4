import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Adds to a wheel what setup() has no field for.

    The start-up file goes beside the package; configs and tools go to
    ``clustr_mm/.mim``, where OpenMMLab packages have theirs.
    """

    START_UP = 'clustr_mm/compat/clustr_mm.pth'
    FOLDERS = ('configs', 'tools')

    def run(self) -> None:
        editable = getattr(self, 'editable_mode', False)
        if not editable:
            # What is left of an earlier build may no longer exist in the sources.
            shutil.rmtree(Path(self.build_lib, 'clustr_mm'), ignore_errors=True)
        super().run()
        if editable:
            return
        self.copy_file(self.START_UP, self.build_lib)
        for folder in self.FOLDERS:
            target = Path(self.build_lib, 'clustr_mm/.mim', folder)
            shutil.copytree(
                folder, target, ignore=shutil.ignore_patterns('__pycache__')
            )


setup(
    name='clustr_mm',
    version='0.1.0',
    description='ClusTR backbone for MMDetection, MMSegmentation and MMPose',
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['clustr_mm', 'clustr_mm.*']),
    package_data={'clustr_mm.compat': ['*.pth']},
    cmdclass={'build_py': BuildPy},
    python_requires='>=3.10',
    install_requires=['torch>=2.1', 'mmengine>=0.10'],
)
