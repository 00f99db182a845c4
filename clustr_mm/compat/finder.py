"""Offers the stand-in for ``mmcv._ext`` to Python's import system.

``clustr_mm.pth`` loads this file at the start of Python, because some stock scripts
(``mim test mmdet``) import ``mmcv.ops`` before they read the config that names
``clustr_mm``. Every start of Python pays for what it imports, so that is next to
nothing: neither ``pathlib`` nor ``importlib.abc``, with ``tempfile`` behind it.
"""

import importlib.util
import os.path
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

_NAME = 'mmcv._ext'
_STAND_IN = os.path.join(os.path.dirname(__file__), 'mmcv_ext.py')


class StandInFinder:
    """Meta path finder that knows one module, ``mmcv._ext``.

    It belongs at the end of ``sys.meta_path``: there it is asked only after every
    other finder has failed, so that a compiled extension always wins.
    """

    def find_spec(
        self,
        fullname: str,
        path: list[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Find the stand-in.

        Args:
            fullname (str): Absolute name of the module looked for.
            path (list[str], optional): ``__path__`` of the parent package.
            target (ModuleType, optional): Module object to be reloaded.

        Returns:
            ModuleSpec | None: A spec that loads ``mmcv_ext.py`` of this package
            under the name ``mmcv._ext``; None for any other name.
        """
        if fullname != _NAME:
            return None
        return importlib.util.spec_from_file_location(_NAME, _STAND_IN)


def install_finder() -> None:
    """Append the finder to ``sys.meta_path`` unless it is there already."""
    # By name: at the start of Python this file is loaded as another module.
    present = {type(finder).__name__ for finder in sys.meta_path}
    if StandInFinder.__name__ not in present:
        sys.meta_path.append(StandInFinder())


def mmcv_ops_are_stand_in() -> bool:
    """Tell whether ``mmcv.ops`` runs, or would run, on the stand-in.

    Looking for ``mmcv._ext`` imports its parent package ``mmcv``.

    Returns:
        bool: True if ``mmcv._ext`` resolves to the stand-in. False if it resolves to
        a compiled extension or to nothing, or if mmcv cannot be imported.
    """
    try:
        spec = importlib.util.find_spec(_NAME)
    except (ImportError, ValueError):
        return False
    # By the file's name: the start-up file may serve another copy of the package,
    # the installed one where this one is a checkout.
    return (
        spec is not None
        and spec.origin is not None
        and os.path.basename(spec.origin) == os.path.basename(_STAND_IN)
    )
