"""Draw the clusters that ClusTR sees in pictures, and where a point of them looks.

For every stage with clusters and both scales: the clusters in the mean colour of their
pixels, with borders and centres, and the weights of the tokens in their clusters. With
--point, in place of the weights: how much the token at that point gets from each token,
by the attention to its cluster and the weight in it, mean over the heads.

Examples:
    python tools/analysis_tools/visualize_clusters.py photo.jpg
    python tools/analysis_tools/visualize_clusters.py photo.jpg --point 320 200
    python tools/analysis_tools/visualize_clusters.py data/*.jpg --out pictures \\
        --config configs/mmseg/fpn_clustr-t_toy-ade20k.py --checkpoint iter_500.pth
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from common import at_least, command_line
from PIL import Image

from clustr_mm import ClusTR
from clustr_mm.files import shorten, write_whole
from clustr_mm.visualization import (
    Pixels,
    clustered_stages,
    compute_maps,
    draw_figure,
    import_libraries,
    load_backbone,
    read_image,
    resize_image,
    token_at,
)

BLOCKS = {'first': 0, 'last': -1}

#: What finds clusters, by the names of the command line.
CLUSTERERS = {'dpc-knn': 'DPCKNN', 'kmeans': 'KMeans', 'grid': 'GridCells'}


def parse_block(text: str) -> int:
    """A block by its name or number."""
    if text not in BLOCKS and not text.isdecimal():
        message = f'must be first, last or a number from 0, got {text!r}'
        raise argparse.ArgumentTypeError(message)
    return BLOCKS[text] if text in BLOCKS else int(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line('visualize_clusters.py', __doc__)
    add, pixels = parser.add_argument, dict(type=at_least(1), metavar='PIXELS')
    add('images', nargs='+', type=Path, metavar='IMAGE')
    either = parser.add_mutually_exclusive_group().add_argument
    either('--config', type=Path, help='of a backbone or of a model that has it')
    either('--arch', choices=list(ClusTR.arch_zoo), help='without --config; tiny')
    add('--checkpoint', type=Path, help='without it weights are random')
    either = parser.add_mutually_exclusive_group().add_argument
    either('--clusterer', choices=CLUSTERERS, help="in place of the config's")
    text = 'cluster by dpc-knn in windows of this side'
    either('--cluster-window', **pixels, help=text)
    add('--max-clusters', type=at_least(1), help='most coarse clusters of a stage')
    add('--size', **pixels, default=448, help='shrink to this longer side (448)')
    text = 'first, last or INDEX from 0, of the stages that have so many (last)'
    add('--block', type=parse_block, default='last', metavar='INDEX', help=text)
    text = 'pixel of the picture, from its upper left corner, that attends'
    add('--point', type=int, nargs=2, metavar=('X', 'Y'), help=text)
    text = 'longer side of each picture in the result (448)'
    add('--panel', type=at_least(32), default=448, metavar='PIXELS', help=text)
    text = 'folder, or for one picture a name that ends in .png'
    add('--out', type=Path, default='work_dirs/visualize_clusters', help=text)
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser


def find_targets(args: argparse.Namespace) -> list[Path]:
    """Name the result of each picture; none replaces another or a picture."""
    kind = 'clusters' if args.point is None else 'attention'
    targets = [args.out / f'{image.stem}_{kind}.png' for image in args.images]
    if args.out.suffix == '.png':
        targets = [args.out] * len(targets)
    if len(set(targets)) < len(targets):
        raise ValueError(f'--out {args.out} would get several pictures of one name')
    sources = {image.resolve() for image in args.images}
    for target in targets:
        if target.resolve() in sources:
            raise ValueError(f'--out would replace the picture {target}')
    return targets


def find_stages(backbone: ClusTR, block: int) -> list[int]:
    """Stages, from 0, that have clusters and this block."""
    stages = clustered_stages(backbone)
    depths = {stage: len(backbone.stages[stage].blocks) for stage in stages}
    last = max(depths.values(), default=0) - 1
    if block > last:
        raise ValueError(f'--block must be first, last or up to {last}, got {block}')
    return [stage for stage in stages if block < depths[stage]]


def build(args: argparse.Namespace) -> tuple[ClusTR, Pixels, str]:
    """Build the backbone, and say which it is."""
    name = args.config.stem if args.config else f'ClusTR-{args.arch or "tiny"}'
    changes = {}
    if args.clusterer:
        changes['clusterer'] = dict(type=CLUSTERERS[args.clusterer])
        name += f', {args.clusterer}'
    if args.cluster_window:
        changes['clusterer'] = dict(type='DPCKNN', window=args.cluster_window)
        name += f', windows of {args.cluster_window} pixels'
    if args.max_clusters:
        changes['max_clusters'] = args.max_clusters
        name += f', at most {args.max_clusters} coarse clusters'
    if args.checkpoint:
        name += f', weights of {args.checkpoint.name}'
    source = (args.config, args.checkpoint, args.arch or 'tiny')
    backbone, pixels = load_backbone(*source, **changes)
    return backbone.to(args.device), pixels, name


def visualize(
    path: Path, backbone: ClusTR, pixels: Pixels, name: str, args: argparse.Namespace
) -> bytes:
    """Draw one picture as a PNG file."""
    picture = read_image(path)
    height, width = picture.shape[:2]
    seen = resize_image(picture, args.size, enlarge=False)
    size, point = f'{width} × {height} pixels', None
    if seen is not picture:
        size += f', the network sees {seen.shape[1]} × {seen.shape[0]}'
    if args.point is not None:
        x, y = args.point
        try:
            token_at((x, y), (height, width), (1, 1))
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error
        # The middle of the pixel, in the picture that the network sees.
        zoom = seen.shape[1] / width, seen.shape[0] / height
        point = ((x + 0.5) * zoom[0], (y + 0.5) * zoom[1])
    inputs = pixels.normalise(seen).to(args.device)
    stages = find_stages(backbone, args.block)
    maps = compute_maps(backbone, inputs, stages, args.block, point)
    alarm = '' if args.checkpoint else 'UNTRAINED: these weights are random'
    figure = draw_figure(seen, maps, path.name, [name, size], alarm, point, args.panel)
    file = BytesIO()
    Image.fromarray(figure).save(file, 'png')
    return file.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the pictures; the exit status is 0 if all were drawn, 1 if not."""
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    try:
        import_libraries()
        targets = find_targets(args)
        backbone, pixels, name = build(args)
        find_stages(backbone, args.block)
        targets[0].parent.mkdir(parents=True, exist_ok=True)
    # A device that is not there is a RuntimeError, or where PyTorch was built without
    # it an AssertionError.
    except (ImportError, ValueError, OSError, RuntimeError, AssertionError) as error:
        parser.error(shorten(error))

    failed = 0
    for number, (path, target) in enumerate(zip(args.images, targets), 1):
        place, start = f'[{number}/{len(targets)}]', time.monotonic()
        try:
            write_whole(target, visualize(path, backbone, pixels, name, args))
        # PyTorch says by RuntimeError that memory is short.
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            failed += 1
            print(place, shorten(error), file=sys.stderr, flush=True)
        else:
            took = time.monotonic() - start
            print(f'{place} wrote {target}, took {took:.1f} s', flush=True)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
