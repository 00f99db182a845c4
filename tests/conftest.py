import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be
# chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
