"""What older versions of torch lack."""

import pytest
import torch

from clustr_mm.compat.safe_load import HAS_ALLOW_LIST

# Before 2.2 a CPU has no products of float16, in autocast or out of it.
HALF = [torch.bfloat16]
if hasattr(torch.ops.aten, '_scaled_dot_product_flash_attention_for_cpu'):
    HALF.append(torch.float16)

# Attention of any model of this kind cannot be traced.
compiles = pytest.mark.skipif(
    not hasattr(torch.library, 'register_fake'), reason='torch before 2.4'
)

# Files are not restricted, or the safe loader does not read what a training saves.
restricted = pytest.mark.skipif(not HAS_ALLOW_LIST, reason='torch before 2.6')
