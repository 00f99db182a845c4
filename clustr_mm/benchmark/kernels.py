"""Kernels that a GPU would start, for tensors of a ``FakeTensorMode`` on 'cuda'."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import search
from ..ops.dpc_knn import _dpc_knn

#: Allocations that write nothing, and a view that does not say so.
NO_KERNEL = {'empty', 'empty_like', 'empty_strided', 'new_empty', '_unsafe_view'}


def starts_kernel(schema: torch.FunctionSchema) -> bool:
    """Every operator counts as one kernel, but views, allocations and metadata.

    What runs several kernels inside, as sort() and index_put() do, counts as one.
    """
    view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
    space, name = schema.name.split('::')
    return not (view or space == 'prim' or name in NO_KERNEL)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func: Any, _: Any, args: Any, kwargs: Any) -> Any:
        if starts_kernel(func._schema):
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def count_kernels() -> Iterator[Counter]:
    """Count by the name of the operator what tensors on a fake GPU would start.

    It goes the ways of a GPU: attention is one kernel, and so is the Triton search;
    what is around that, and the rest of the clustering, is counted one by one.
    """
    attention = patch.object(F, 'scaled_dot_product_attention', _attention)
    kernel = patch.object(search, 'find_kernel', lambda tokens: _search)
    opened = patch.object(torch.ops.clustr_mm, 'dpc_knn', _dpc_knn)
    with attention, kernel, opened, _Operators() as mode:
        yield mode.counts


def _attention(*qkv: Tensor, attn_mask: Any = None, **_: Any) -> Tensor:
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(*qkv, attn_mask, False)[0]


class _Launch:
    def __getitem__(self, grid: Any) -> Callable:
        return lambda *args, **_: args[4].zero_()  # what is found; one kernel, too


def _search(*args: Any) -> Tensor:
    from ..ops import triton_search as module

    gpu = dict(device_of=nullcontext, get_device_capability=lambda device: (8, 0))
    kernel = patch.object(module, '_search_kernel', _Launch())
    with kernel, patch.multiple(torch.cuda, **gpu):
        return module.search(*args)


def on_fake_gpu(model: nn.Module) -> nn.Module:
    """Move a model, in a FakeTensorMode; its tensors lose their numbers."""
    return model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device='cuda'))
