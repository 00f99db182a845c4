"""Offers the stand-in for ``mmcv._ext`` to Python's import system.

The start-up file of ``python -m clustr_mm.compat on`` runs this file, without the rest
of the package, at every start of Python. So it imports next to nothing: neither
``pathlib`` nor ``importlib.abc``, with ``tempfile`` behind it.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

#: Environment variable that switches off, by '0', all that this package adds.
VARIABLE = 'CLUSTR_MM_COMPAT'

_NAME = 'mmcv._ext'
_STAND_IN = os.path.join(os.path.dirname(__file__), 'mmcv_ext.py')


class StandInFinder:
    """Meta path finder that knows one module, ``mmcv._ext``.

    It belongs at the end of ``sys.meta_path``: there it is asked only after every
    other finder has failed, so that a compiled extension always wins.
    """

    def find_spec(
        self, fullname: str, path: object, target: object = None
    ) -> ModuleSpec | None:
        """Find ``mmcv_ext.py`` under the name ``mmcv._ext``, and nothing else."""
        if fullname != _NAME:
            return None
        return importlib.util.spec_from_file_location(_NAME, _STAND_IN)


class ConfigsFinder:
    """Meta path finder that adds to ``mmengine.config.utils`` when that is imported."""

    def find_spec(
        self, fullname: str, path: list[str], target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find this module as always, and let :func:`add_configs` follow it."""
        if fullname != 'mmengine.config.utils':
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                add_configs(module)

            spec.loader.exec_module = exec_module
        return spec


def add_configs(utils: ModuleType) -> None:
    """Let configs inherit from ``clustr_mm::mmdet/...``.

    Args:
        utils (ModuleType): The module ``mmengine.config.utils``.
    """
    # MMEngine looks for a folder .mim beside the distribution's record, where an
    # editable installation has no package. Of a name that is no distribution it
    # takes the folder of the module, which is right for every installation.
    utils.MODULE2PACKAGE.setdefault('clustr_mm', 'clustr_mm.files')


def install_finder(finder: object, position: int) -> None:
    """Add a finder to ``sys.meta_path`` unless one of its kind is there already."""
    # By name: at the start of Python this file is loaded as another module.
    present = {type(other).__name__ for other in sys.meta_path}
    if type(finder).__name__ not in present:
        sys.meta_path.insert(position, finder)


def start() -> None:
    """Do what the start-up file is for; it calls this."""
    if os.environ.get(VARIABLE) != '0':
        install_finder(StandInFinder(), len(sys.meta_path))
        install_finder(ConfigsFinder(), 0)


def mmcv_lacks_operators() -> bool:
    """Whether mmcv is installed without a compiled ``mmcv._ext``; imports neither."""
    try:
        mmcv = importlib.util.find_spec('mmcv')
    except ValueError:  # something under this name that was not imported from a file
        return False
    return mmcv is not None and not PathFinder.find_spec(
        _NAME, mmcv.submodule_search_locations
    )


def mmcv_ops_are_stand_in() -> bool:
    """Whether ``mmcv.ops`` runs, or would run, on the stand-in; imports ``mmcv``."""
    try:
        spec = importlib.util.find_spec(_NAME)
    except (ImportError, ValueError):
        return False
    # By the file's name: the start-up file may serve another copy of the package,
    # the installed one where this one is a checkout.
    name = os.path.basename(_STAND_IN)
    return spec is not None and os.path.basename(spec.origin or '') == name
