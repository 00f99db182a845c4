"""Count the kernels that backbones start in a forward pass on a GPU, without one.

Examples:
    count_kernels.py
    count_kernels.py clustr-b swin-t --sizes 224 800x1344 --top 10
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from backbones import find_backbone, presets
from common import command_line, import_extra, parse_shape
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from clustr_mm.ops import search
from clustr_mm.ops.dpc_knn import _dpc_knn

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
    from clustr_mm.ops import triton_search as module

    gpu = dict(device_of=nullcontext, get_device_capability=lambda device: (8, 0))
    kernel = patch.object(module, '_search_kernel', _Launch())
    with kernel, patch.multiple(torch.cuda, **gpu):
        return module.search(*args)


#: What the others are compared with.
BASELINE = 'pvtv2-b2'


@cache
def count(name: str, size: tuple[int, int]) -> Counter:
    """Kernels of one forward pass on one image, by the name of the operator."""
    # Built with numbers: some backbones read theirs.
    model = find_backbone(name).build().eval()
    with FakeTensorMode(), torch.no_grad():
        # Its tensors lose their numbers.
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device='cuda'))
        image = torch.empty(1, 3, *size, device='cuda')
        with count_kernels() as counts:
            model(image)
    return counts


def main() -> None:
    """Print the table."""
    parser = command_line('count_kernels.py', __doc__)
    add, default = parser.add_argument, ['clustr-s', 'clustr-s-linear']
    known = f'presets ({", ".join(presets())}) or config files'
    add('backbones', nargs='*', default=default, help=known)
    size = partial(parse_shape, like='800x1344')
    add('--sizes', nargs='+', type=size, default=[(224, 224), (512, 512)])
    add('--top', type=int, default=0, help='show the most frequent operators')
    args = parser.parse_args()
    tabulate = import_extra('tabulate').tabulate
    rows, tops = [], []
    for height, width in args.sizes:
        for name in dict.fromkeys((BASELINE, *args.backbones)):
            try:
                counts, base = (count(n, (height, width)) for n in (name, BASELINE))
            except ValueError as error:
                parser.error(str(error))
            ratio = counts.total() / base.total()
            rows.append((f'{height}x{width}', name, counts.total(), ratio))
            operators = ', '.join(f'{op} {n}' for op, n in counts.most_common(args.top))
            tops.append(f'{name}, {height}x{width}: {operators}')
    head = ('input', 'backbone', 'kernels', f'/ {BASELINE}')
    print(tabulate(rows, head, 'pipe', floatfmt='.2f'))
    if args.top:
        print('', *tops, sep='\n')


if __name__ == '__main__':
    main()
