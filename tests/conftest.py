import functools
import gc
import os

# Tests run side by side: one thread each, for their subprocesses as well, or they
# would wait for each other. Read when torch is imported.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from mmengine.config import utils

# Without a GPU the Triton kernels run in Triton's interpreter, which must be
# chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

# Variables that configs read would change what the tests see.
for name in ('CLUSTR_CHECKPOINT', 'CLUSTR_IMG_SCALE'):
    os.environ.pop(name, None)

# MMEngine reads all metafiles of a toolbox for every base that a config has there.
utils.load = functools.cache(utils.load)

# The toolboxes make a million objects that stay: the collector shall look less often.
gc.set_threshold(100_000)
