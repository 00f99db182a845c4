from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Puts the start-up file beside the package, for which setup() has no field."""

    START_UP = 'clustr_mm/compat/clustr_mm.pth'

    def run(self) -> None:
        super().run()
        if not getattr(self, 'editable_mode', False):
            self.copy_file(self.START_UP, self.build_lib)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return [*outputs, str(Path(self.build_lib, Path(self.START_UP).name))]


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
