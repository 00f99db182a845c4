"""Count the kernels that backbones start in a forward pass on a GPU, without one.

Examples:
    python tools/analysis_tools/count_kernels.py
    python tools/analysis_tools/count_kernels.py clustr-b swin-t --sizes 224 800x1344 --top 10
"""

from __future__ import annotations

import argparse
from collections import Counter
from functools import cache

import torch
from torch._subclasses import FakeTensorMode

from clustr_mm.benchmark import find_backbone, presets
from clustr_mm.benchmark.kernels import count_kernels, on_fake_gpu

#: What the others are compared with.
BASELINE = 'pvtv2-b2'

#: By default: a pre-training's, and a segmentation's.
SIZES = [(224, 224), (512, 512)]


def parse_size(text: str) -> tuple[int, int]:
    """Read '512' or '800x1344', height first."""
    height, _, width = text.partition('x')
    size = int(height), int(width or height)
    if min(size) < 1:
        raise ValueError(text)
    return size


@cache
def count(name: str, size: tuple[int, int]) -> Counter:
    """Kernels of one forward pass on one image, by the name of the operator."""
    # Built with numbers: some backbones read theirs.
    model = find_backbone(name).build().eval()
    with FakeTensorMode(), torch.no_grad():
        on_fake_gpu(model)
        image = torch.empty(1, 3, *size, device='cuda')
        with count_kernels() as counts:
            model(image)
    return counts


def to_markdown(names: list[str], sizes: list[tuple[int, int]]) -> str:
    """A row for every size and backbone."""
    lines = [
        f'| input | backbone | kernels | / {BASELINE} |',
        '| --- | --- | --: | --: |',
    ]
    for size in sizes:
        baseline = count(BASELINE, size).total()
        for name in dict.fromkeys((BASELINE, *names)):
            number = count(name, size).total()
            lines.append(
                f'| {size[0]}x{size[1]} | {name} | {number} | {number / baseline:.2f} |'
            )
    return '\n'.join(lines)


def top(names: list[str], sizes: list[tuple[int, int]], number: int) -> str:
    """The operators that start most kernels."""
    lines = []
    for size in sizes:
        for name in names:
            counts = count(name, size).most_common(number)
            operators = ', '.join(f'{op} {n}' for op, n in counts)
            lines.append(f'{name}, {size[0]}x{size[1]}: {operators}')
    return '\n'.join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'backbones',
        nargs='*',
        default=['clustr-s', 'clustr-s-linear'],
        help=f'presets ({", ".join(presets())}) or config files',
    )
    parser.add_argument('--sizes', nargs='+', type=parse_size, default=SIZES)
    parser.add_argument('--top', type=int, default=0, help='most frequent operators')
    args = parser.parse_args()
    try:
        print(to_markdown(args.backbones, args.sizes))
    except ValueError as error:
        parser.error(str(error))
    if args.top:
        print('\n' + top(args.backbones, args.sizes, args.top))


if __name__ == '__main__':
    main()
