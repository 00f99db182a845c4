"""What lets the stock OpenMMLab toolboxes run on today's PyTorch.

:func:`activate` is the one function that changes anything outside of this package.
"""

import os
import sys

import mmengine
import torch
from mmengine.utils import digit_version

from .finder import (
    VARIABLE,
    StandInFinder,
    install_finder,
    mmcv_lacks_operators,
    mmcv_ops_are_stand_in,
)
from .safe_load import allow_runner_checkpoints

__all__ = ['activate', 'mmcv_ops_are_stand_in']

# pip sees to it, unless it was told not to look at requirements.
for _package, _oldest in [(torch, '2.1.0'), (mmengine, '0.10.0')]:
    if digit_version(_package.__version__) < digit_version(_oldest):
        raise ImportError(
            f'clustr_mm needs {_package.__name__} {_oldest} or later, '
            f'found {_package.__version__}'
        )


def activate() -> None:
    """Add what is missing for today's stack, unless ``CLUSTR_MM_COMPAT=0``.

    - Where mmcv is installed without its compiled operators, a finder for a stand-in
      (see :mod:`clustr_mm.compat.mmcv_ext`).
    - Where torch restricts what a checkpoint may name, from 2.6 on, an allow-list for
      those of MMEngine's runner (see :mod:`clustr_mm.compat.safe_load`).

    Prints nothing, may be called any number of times, and imports neither mmcv nor
    torchvision.

    Raises:
        ValueError: If the environment variable is neither '0' nor '1'.
    """
    switch = os.environ.get(VARIABLE, '1')
    if switch not in ('0', '1'):
        raise ValueError(f"{VARIABLE} must be '0' or '1', got {switch!r}")
    if switch == '0':
        return
    if mmcv_lacks_operators():
        install_finder(StandInFinder(), len(sys.meta_path))
    allow_runner_checkpoints()
