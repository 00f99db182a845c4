import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be
# chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

# Variables that configs read would change what the tests see.
for name in ('CLUSTR_CHECKPOINT', 'CLUSTR_IMG_SCALE'):
    os.environ.pop(name, None)
