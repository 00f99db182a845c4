from pathlib import Path

from setuptools import find_packages, setup

setup(
    name='clustr_mm',
    version='0.1.0',
    description='ClusTR backbone for MMDetection, MMSegmentation and MMPose',
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['clustr_mm', 'clustr_mm.*']),
    python_requires='>=3.10',
    install_requires=['torch>=2.1', 'mmengine>=0.10'],
)
