"""Memory of a training step on a GPU, counted without one.

Every operation of the forward and the backward pass runs on tensors without numbers
(FakeTensorMode), and their sizes are added up (MemTracker): what a GPU holds at the
peak, apart from what its libraries take for themselves.

Examples:
    python tools/training_memory.py
    python tools/training_memory.py --inputs 4x512x512 --backbones clustr-s-linear
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from clustr_mm.benchmark import Backbone, find_backbone
from clustr_mm.benchmark.memory import GIB, describe
from clustr_mm.ops import clusterers, search

dpc_module = importlib.import_module('clustr_mm.ops.dpc_knn')

BASELINE = 'pvtv2-b2'

CAPTION = (
    'GiB that tensors take at the peak of a training step (forward and backward pass, '
    'bfloat16 autocast, no optimizer): parameters, gradients, activations and '
    'temporary ones, counted operation by operation without a GPU; in parentheses the '
    'ratio to {baseline} without `with_cp`. The clustering is counted the same way, '
    'with the blocks of a GPU (2**{block} numbers at a time): "(Triton)" by the '
    'kernel, which keeps no distance in memory, "(torch)" by plain torch. Workspace '
    'of cuBLAS and cuDNN, sorting and the allocator come on top.'
)


@contextmanager
def as_on_a_gpu(triton: bool) -> Iterator[None]:
    """Have tensors of the CPU take the ways of a GPU."""
    blocks = {'cpu': search.BLOCK_ELEMENTS['cuda']}
    dense = {'cpu': search.DENSE_ELEMENTS['cuda']}

    def cluster(tokens: Tensor, counts: Sequence[int], k: int) -> list[Tensor]:
        # Not the operator, in which nothing is counted.
        return dpc_module._dpc_knn(tokens.detach(), counts, k)

    patches = [
        mock.patch.dict(search.BLOCK_ELEMENTS, blocks),
        mock.patch.dict(search.DENSE_ELEMENTS, dense),
        mock.patch.object(clusterers, 'dpc_knn', cluster),
        mock.patch.object(search, 'may_read', lambda tokens: False),
        mock.patch.object(dpc_module, 'may_read', lambda tokens: False),
        # What autocast computes in float32 on a GPU, and not on a CPU.
        mock.patch.object(F, 'layer_norm', in_float32(F.layer_norm)),
        mock.patch.object(F, 'softmax', in_float32(F.softmax)),
    ]
    if triton:
        patches.append(mock.patch.object(search, 'find_kernel', lambda _: fake_kernel))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of the first argument in float32."""
    return lambda x, *args, **kwargs: function(x.float(), *args, **kwargs)


def fake_kernel(
    queries: Tensor, keys: Tensor, width: int, limits: Tensor | None
) -> Tensor:
    """Take the memory that ``clustr_mm.ops.triton_search.search`` takes."""
    norms = keys.square().sum(dim=2)
    found = queries.new_empty((*queries.shape[:2], width), dtype=torch.int32)
    # Inputs of other widths are padded to whole tiles.
    padded = [F.pad(x, (0, -x.shape[2] % 16)) for x in (queries, keys)]
    del norms, padded
    return found.long()


def strip_numbers(model: nn.Module) -> None:
    """Make parameters and buffers fake ones; call it in FakeTensorMode."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype)
                module._parameters[name] = nn.Parameter(empty, value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


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


def plan(names: Sequence[str]) -> Iterator[tuple[str, Backbone, bool, bool]]:
    """Rows of the table: label, backbone, ``with_cp``, by the Triton kernel."""
    for name in names:
        backbone = find_backbone(name)
        ours = backbone.cfg['type'] == 'ClusTR'
        exact = ours and backbone.cfg.get('clusterer', {}).get('type') is None
        for with_cp in (False, True) if ours else (False,):
            cfg = dict(backbone.cfg, with_cp=True) if with_cp else backbone.cfg
            for triton in (True, False) if exact else (False,):
                way = (' (Triton)' if triton else ' (torch)') if exact else ''
                label = f'{name}{way}{", with_cp" if with_cp else ""}'
                yield label, Backbone(label, cfg, backbone.scope), with_cp, triton


def parse_shape(text: str) -> tuple[int, ...]:
    """Read '2x800x1344': batch, height, width."""
    if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){2}', text):
        raise argparse.ArgumentTypeError(
            f'must be like 2x800x1344 (batch, height, width), got {text!r}'
        )
    return tuple(map(int, text.split('x')))


def main(argv: Sequence[str] | None = None) -> int:
    """Count and print a Markdown table.

    Args:
        argv (Sequence[str], optional): Arguments, by default the command line's.

    Returns:
        int: Exit status.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [BASELINE, 'clustr-s-linear', 'clustr-s']
    shapes = [(4, 512, 512), (2, 800, 1344)]
    add('--backbones', nargs='+', default=names, help='presets of tools/benchmark.py')
    add('--inputs', nargs='+', type=parse_shape, default=shapes, metavar='BxHxW')
    args = parser.parse_args(argv)
    try:
        rows = list(plan(args.backbones))
    except ValueError as error:
        parser.exit(2, f'training_memory.py: {error}\n')

    found: dict[tuple, int | str] = {}
    for shape in args.inputs:
        for label, backbone, _, triton in rows:
            print(f'{label} {"x".join(map(str, shape))} ...', file=sys.stderr)
            try:
                found[label, shape] = peak_memory(backbone, shape, triton)
            except Exception as error:
                found[label, shape] = describe(error)
            print(f'  {found[label, shape]}', file=sys.stderr)
    print_table([label for label, *_ in rows], args.inputs, found)
    return int(any(isinstance(value, str) for value in found.values()))


def print_table(labels: Sequence[str], shapes: Sequence, found: dict) -> None:
    """Print the table and what it shows."""
    block = search.BLOCK_ELEMENTS['cuda'].bit_length() - 1
    print(f'{CAPTION.format(baseline=BASELINE, block=block)}\n')
    print('| backbone |', ' | '.join('x'.join(map(str, shape)) for shape in shapes), '|')
    print('| --- |', ' | '.join('---:' for _ in shapes), '|')
    for label in labels:
        cells = []
        for shape in shapes:
            value, base = found[label, shape], found.get((BASELINE, shape))
            text = value if isinstance(value, str) else f'{value / GIB:.2f}'
            if isinstance(value, int) and isinstance(base, int):
                text += f' ({value / base:.2f}×)'
            cells.append(text)
        print(f'| {label} |', ' | '.join(cells), '|')


if __name__ == '__main__':
    sys.exit(main())
