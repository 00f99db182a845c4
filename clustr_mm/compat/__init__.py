"""What lets the stock OpenMMLab toolboxes run on today's PyTorch.

:func:`activate` installs two independent pieces:

- a stand-in for ``mmcv._ext``, the compiled half of ``mmcv.ops``, which mmcv-lite
  does not ship (see :mod:`clustr_mm.compat.finder`);
- the allow-list with which ``torch.load(weights_only=True)`` reads the checkpoints
  of MMEngine's runner (see :mod:`clustr_mm.compat.safe_load`).
"""

import mmengine
import torch
from mmengine.utils import digit_version

from .finder import install_finder, mmcv_ops_are_stand_in
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
    """Install the stand-in finder and the checkpoint allow-list.

    Prints nothing, may be called any number of times, and imports neither mmcv nor
    torchvision.
    """
    install_finder()
    allow_runner_checkpoints()
