"""What is installed, and which distributions stand behind it."""

from __future__ import annotations

import importlib.util
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata

from .records import OK, WARN, Check

#: Import names of what this package works with.
MODULES = (
    *('torch', 'torchvision', 'triton', 'numpy', 'cv2', 'setuptools'),
    *('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpose', 'mmpretrain', 'mim'),
    *('xtcocotools', 'ftfy', 'regex', 'safetensors', 'clustr_mm'),
)


#: Stands for a version that a damaged record does not tell.
BROKEN = 'of a damaged record'


def find_distributions() -> dict[str, dict[str, str]]:
    """Ask pip's records who brought which module.

    Returns:
        dict[str, dict[str, str]]: For each of ``MODULES`` the distributions that
        own it, and their versions.
    """
    named: dict[str, list[str | None]] = {}
    for distribution in metadata.distributions():
        for module in _modules(distribution):
            named.setdefault(module, []).append(_name(distribution))
    found: dict[str, dict[str, str]] = {}
    for module in MODULES:
        owners = found[module] = {}
        for name in named.get(module, [module]):
            try:
                version = metadata.version(name) if name else None
            except metadata.PackageNotFoundError:
                continue
            except OSError:
                version = None
            # pip does not tell the spellings apart either.
            owner = re.sub(r'[-_.]+', '-', name or module).lower()
            owners[owner] = version or BROKEN
    return found


def _name(distribution: metadata.Distribution) -> str | None:
    # An interrupted uninstallation leaves a folder without this file; what that
    # means depends on whether the package importlib_metadata is imported.
    try:
        return distribution.metadata['Name']
    except OSError:
        return None


def _modules(distribution: metadata.Distribution) -> set[str]:
    declared = distribution.read_text('top_level.txt')
    if declared is not None:
        return set(declared.split())
    files = [file for file in distribution.files or () if file.suffix == '.py']
    return {file.parts[0].removesuffix('.py') for file in files}


def is_installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def check_python() -> Check:
    """Interpreter and machine."""
    python = f'{platform.python_implementation()} {platform.python_version()}'
    return Check('python', OK, f'{python}, {platform.platform()}')


def check_versions(
    owners: Mapping[str, Mapping[str, str]], modules: Sequence[str] = MODULES
) -> list[Check]:
    """Versions of modules, without importing them.

    Args:
        owners (Mapping): See :func:`find_distributions`.
        modules (Sequence[str]): Import names. Defaults to all that matter.

    Returns:
        list[Check]: One for each. A missing module is no failure.
    """
    return [check_version(module, owners.get(module, {})) for module in modules]


def check_version(module: str, owners: Mapping[str, str]) -> Check:
    """Version of one module.

    Args:
        module (str): Its import name.
        owners (Mapping[str, str]): Distributions that own it, and their versions.

    Returns:
        Check: A warning if there are several that overwrite each other, or one of
        which it is known that not all works.
    """
    name = f'version of {module}'
    if not owners:
        if not is_installed(module):
            return Check(name, OK, 'not installed')
        hint = None
        if module == 'clustr_mm':
            hint = (
                '`mim train` runs elsewhere and finds it only when it is installed: '
                'pip install .'
            )
        return Check(name, WARN if hint else OK, 'found, but not installed', hint)
    text = ', '.join(
        version if owner == module.replace('_', '-') else f'{owner} {version}'
        for owner, version in sorted(owners.items())
    )
    if BROKEN in owners.values():
        return Check(
            *(name, WARN, text),
            'a *.dist-info folder in site-packages has no METADATA: delete it and '
            'install the package again',
        )
    if any(owner.startswith('onedl-') for owner in owners):
        return Check(
            *(name, WARN, text),
            'a fork under the same import name: with those of OneDL, configs based '
            'on `mmseg::` do not resolve, and there is no mmpose',
        )
    # Two builds of OpenCV of one version are what mmpose and mmpretrain ask for.
    if len(owners) > 1 and (module != 'cv2' or len(set(owners.values())) > 1):
        one = sorted(owners)[0]
        return Check(
            *(name, WARN, text),
            f'they overwrite each other in the folder {module}: uninstall all of '
            f'them, then install one, such as {one}, or all in the same version',
        )
    return Check(name, OK, text)
