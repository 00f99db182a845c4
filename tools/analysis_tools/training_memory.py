"""Memory of a training step on a GPU, counted without one.

Every operation of the forward and the backward pass runs on tensors without numbers
(FakeTensorMode), and their sizes are added up (MemTracker). Takes some minutes.
Example: training_memory.py --inputs 4x512x512 --backbones clustr-s-linear
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from unittest import mock

import torch
from backbones import Backbone, find_backbone
from common import command_line, describe, import_extra, parse_shape
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from clustr_mm.ops import clusterers, search

dpc_module = importlib.import_module('clustr_mm.ops.dpc_knn')

BASELINE = 'pvtv2-b2'

CAPTION = f"""\
GiB that tensors take at the peak of a training step (forward and backward pass,
bfloat16 autocast, no optimizer), counted operation by operation without a GPU:
parameters, gradients, activations and temporary ones. In parentheses: over {BASELINE}
without `with_cp`. The clustering is counted likewise, in blocks as on a GPU: "(Triton)"
by the kernel, which keeps no distance in memory, "(torch)" by plain torch. Norms and
softmax are float32, as in autocast on a GPU. Workspace of cuBLAS, cuDNN and of sorting,
and what the allocator rounds up, come on top.
"""


@contextmanager
def as_on_a_gpu(triton: bool) -> Iterator[None]:
    """Have tensors of the CPU take the ways of a GPU."""

    def cluster(tokens: Tensor, counts: Sequence[int], k: int) -> list[Tensor]:
        # Not the operator, in which nothing is counted.
        return dpc_module._dpc_knn(tokens.detach(), counts, k)

    def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # As autocast does on a GPU, and not on a CPU.
        return lambda x, *args, **kwargs: function(x.float(), *args, **kwargs)

    patches = [mock.patch.object(clusterers, 'dpc_knn', cluster)]
    for limits in (search.BLOCK_ELEMENTS, search.DENSE_ELEMENTS):
        patches.append(mock.patch.dict(limits, cpu=limits['cuda']))
    for module in (search, dpc_module):
        patches.append(mock.patch.object(module, 'may_read', lambda _: False))
    for name in ('layer_norm', 'softmax'):
        wide = in_float32(getattr(F, name))
        patches.append(mock.patch.object(F, name, wide))
    if triton:
        patches.append(mock.patch.object(search, 'find_kernel', lambda _: fake_kernel))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def fake_kernel(queries: Tensor, keys: Tensor, width: int, *_: Tensor | None) -> Tensor:
    """Take the memory that ``clustr_mm.ops.triton_search.search`` takes."""
    # Padded inputs, norms, and positions in 32 and 64 bits.
    taken = [torch.empty_like(queries), torch.empty_like(keys), keys[..., 0].clone()]
    found = queries.new_empty((*queries.shape[:2], width), dtype=torch.int32).long()
    del taken
    return found


def strip_numbers(model: nn.Module) -> None:
    """Make parameters and buffers fake ones; call it in FakeTensorMode."""
    for module in model.modules():
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None:
                    kind = dict(dtype=value.dtype, requires_grad=value.requires_grad)
                    values[name] = torch.empty(value.shape, **kind)


def peak_memory(backbone: Backbone, shape: tuple[int, ...], triton: bool) -> int:
    """Bytes at the peak of a training step on images (batch, height, width)."""
    batch, *size = shape
    model = backbone.build()
    model.train()
    with FakeTensorMode(), as_on_a_gpu(triton):
        strip_numbers(model)
        images = torch.empty(batch, 3, *size)
        tracker = MemTracker()
        tracker.track_external(model, images)
        with tracker:
            with torch.autocast('cpu', torch.bfloat16):
                outs = model(images)
                loss = sum(out.float().mean() for out in outs)
            loss.backward()
        snapshot = tracker.get_tracker_snapshot('peak')
    return snapshot[torch.device('cpu')]['Total']


def plan(names: Sequence[str]) -> Iterator[tuple[str, Backbone, bool]]:
    """Rows of the table: label, backbone, and whether the Triton kernel searches."""
    for name in names:
        backbone = find_backbone(name)
        ours = backbone.cfg['type'] == 'ClusTR'
        exact = ours and 'clusterer' not in backbone.cfg
        kinds = product((False, True)[: 1 + ours], (False, True)[: 1 + exact])
        for with_cp, triton in kinds:
            cfg = dict(backbone.cfg, with_cp=True) if with_cp else backbone.cfg
            way = (' (Triton)' if triton else ' (torch)') if exact else ''
            label = f'{name}{way}{", with_cp" if with_cp else ""}'
            yield label, Backbone(label, cfg, backbone.scope), triton


def main(argv: Sequence[str] | None = None) -> int:
    """Count and print a Markdown table; returns the exit status."""
    parser = command_line('training_memory.py', __doc__)
    names = [BASELINE, 'clustr-s-linear', 'clustr-s']
    shapes = [(4, 512, 512), (2, 800, 1344)]
    add = parser.add_argument
    add('--backbones', nargs='+', default=names, help='presets or configs')
    shape = partial(parse_shape, like='2x800x1344')
    add('--inputs', nargs='+', type=shape, default=shapes, metavar='BxHxW')
    args = parser.parse_args(argv)
    try:
        rows = list(plan(args.backbones))
    except ValueError as error:
        parser.error(str(error))

    tabulate = import_extra('tabulate').tabulate
    inputs = ['x'.join(map(str, shape)) for shape in args.inputs]
    lines, bases, status = [], {}, 0
    for label, backbone, triton in rows:
        lines.append([label])
        for name, shape in zip(inputs, args.inputs):
            print(f'{label} {name} ...', file=sys.stderr)
            try:
                used = peak_memory(backbone, shape, triton) / 2**30
                if label == BASELINE:
                    bases[name] = used
                ratio = f' ({used / bases[name]:.2f}×)' if name in bases else ''
                lines[-1].append(f'{used:.2f}{ratio}')
            except Exception as error:
                lines[-1].append(describe(error))
                status = 1
    right = ('left', *('right' for _ in inputs))
    print(
        CAPTION,
        tabulate(lines, ['backbone', *inputs], 'pipe', colalign=right),
        sep='\n',
    )
    return status


if __name__ == '__main__':
    sys.exit(main())
