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
CLUSTERERS = {
    'dpc-knn': 'DPCKNN',
    'kmeans': 'KMeans',
    'grid': 'GridCells',
    'sorted': 'SortedTokens',
}


def parse_block(text: str) -> int:
    """A block by its name or number."""
    if text not in BLOCKS and not text.isdecimal():
        message = f'must be first, last or a number from 0, got {text!r}'
        raise argparse.ArgumentTypeError(message)
    return BLOCKS[text] if text in BLOCKS else int(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line; an error takes one line."""
    parser = command_line('visualize_clusters.py', __doc__)
    add, pixels = parser.add_argument, dict(type=at_least(1), metavar='PIXELS')
    add('images', nargs='+', type=Path, metavar='IMAGE')
    add('--config', type=Path, help='of a backbone or of a model that has it')
    add('--checkpoint', type=Path, help='without it weights are random')
    add('--arch', choices=list(ClusTR.arch_zoo), help='without --config; tiny')
    add('--clusterer', choices=CLUSTERERS, help="in place of the config's")
    add('--cluster-window', **pixels, help='cluster by dpc-knn in windows of this side')
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
    if args.out.suffix == '.png':
        if len(args.images) > 1:
            raise ValueError(
                f'--out must be a folder for many pictures, got {args.out}'
            )
        targets = [args.out]
    else:
        kind = 'clusters' if args.point is None else 'attention'
        targets = []
        for image in args.images:
            number, target = 1, args.out / f'{image.stem}_{kind}.png'
            while target in targets:  # pictures of one name in two folders
                number += 1
                target = args.out / f'{image.stem}_{kind}_{number}.png'
            targets.append(target)
    sources = {image.resolve() for image in args.images}
    for target in targets:
        if target.resolve() in sources:
            raise ValueError(f'--out would replace the picture {target}')
    return targets


def find_stages(backbone: ClusTR, block: int) -> list[int]:
    """Stages, from 0, that have clusters and this block."""
    stages = clustered_stages(backbone)
    if not stages:
        raise ValueError('this backbone has no stage with clusters')
    depths = {stage: len(backbone.stages[stage].blocks) for stage in stages}
    last = max(depths.values()) - 1
    if block > last:
        raise ValueError(f'--block must be first, last or up to {last}, got {block}')
    return [stage for stage in stages if block < depths[stage]]


def build(args: argparse.Namespace) -> tuple[ClusTR, Pixels, str]:
    """Build the backbone, and say which it is."""
    if args.config is not None and args.arch is not None:
        raise ValueError('--arch goes without --config, which says it')
    if args.cluster_window and args.clusterer not in (None, 'dpc-knn'):
        raise ValueError(f'--cluster-window goes without --clusterer {args.clusterer}')
    try:
        torch.empty(0, device=args.device)
    # Builds of PyTorch without a device raise AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = f'--device {args.device} cannot be used here: {shorten(error, 100)}'
        raise ValueError(message) from error
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
    except (ImportError, ValueError, OSError) as error:
        parser.error(str(error))

    failed = 0
    for number, (path, target) in enumerate(zip(args.images, targets), 1):
        place = f'[{number}/{len(targets)}] '
        start = time.monotonic()
        try:
            write_whole(target, visualize(path, backbone, pixels, name, args))
        # PyTorch says by RuntimeError that memory is short.
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            failed += 1
            print(f'{place}{shorten(error)}', file=sys.stderr, flush=True)
        else:
            took = f'took {time.monotonic() - start:.1f} s'
            print(f'{place}wrote {target}, {took}', flush=True)
    if failed and len(targets) > 1:
        print(f'{failed} of {len(targets)} failed', file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
