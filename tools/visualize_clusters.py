"""Draw the clusters that ClusTR sees in pictures, and where a point of them looks.

For every stage with clusters and both scales: the clusters in the mean colour of their
pixels, with borders and centres, and the weights of the tokens in their clusters. With
--point, in place of the weights: how much the token at that point gets from each token,
by the attention to its cluster and the weight in it, mean over the heads.

Examples:
    python tools/visualize_clusters.py photo.jpg
    python tools/visualize_clusters.py photo.jpg --point 320 200 --out photo.png
    python tools/visualize_clusters.py data/*.jpg --out pictures \\
        --config configs/mmseg/fpn_clustr-t_toy-ade20k.py --checkpoint iter_500.pth
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image

from clustr_mm import ClusTR
from clustr_mm.files import shorten, write_whole
from clustr_mm.visualization import (
    Line,
    Pixels,
    clustered_stages,
    compute_maps,
    draw_sheet,
    load_backbone,
    read_image,
    resize_image,
    token_at,
)
from clustr_mm.visualization.sheet import ALARM, TITLE

BLOCKS = {'first': 0, 'last': -1}

#: What finds clusters, by the names of the command line.
CLUSTERERS = {'dpc-knn': 'DPCKNN', 'kmeans': 'KMeans', 'grid': 'GridCells'}


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit."""
        self.exit(2, f'{self.prog}: {message}\n')


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog='visualize_clusters.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('images', nargs='+', type=Path, metavar='IMAGE')
    add(
        '--config',
        type=Path,
        help='of a backbone, detector, segmentor, pose estimator or classifier',
    )
    add('--checkpoint', type=Path, help='without it weights are random')
    add('--arch', choices=list(ClusTR.arch_zoo), help='without --config; tiny')
    add(
        '--clusterer',
        choices=list(CLUSTERERS),
        help="what finds the clusters, by default the config's",
    )
    add(
        '--cluster-window',
        type=int,
        metavar='PIXELS',
        help='cluster by dpc-knn in windows of this side, whatever the config says',
    )
    add(
        '--max-clusters',
        type=int,
        metavar='NUMBER',
        help="most coarse clusters of a stage, by default the config's",
    )
    add(
        '--size',
        type=int,
        default=448,
        metavar='PIXELS',
        help='shrink larger pictures to this longer side for the network (448)',
    )
    add(
        '--block',
        default='last',
        metavar='first|last|INDEX',
        help='of each stage; from 0, and of the stages that have so many (last)',
    )
    add(
        '--point',
        type=int,
        nargs=2,
        metavar=('X', 'Y'),
        help='pixel of the picture, from its upper left corner, that attends',
    )
    add(
        '--panel',
        type=int,
        default=448,
        metavar='PIXELS',
        help='longer side of each picture in the result (448)',
    )
    add(
        '--out',
        type=Path,
        default=Path('work_dirs/visualize_clusters'),
        help='folder, or for one picture a name that ends in .png',
    )
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be."""
    for name, least in [
        *(('cluster_window', 1), ('max_clusters', 1)),
        *(('size', 1), ('panel', 32)),
    ]:
        value = getattr(args, name)
        if value is not None and value < least:
            option = name.replace('_', '-')
            raise ValueError(f'--{option} must be at least {least}, got {value}')
    if args.cluster_window and args.clusterer not in (None, 'dpc-knn'):
        raise ValueError(f'--cluster-window goes without --clusterer {args.clusterer}')
    if args.config is not None and args.arch is not None:
        raise ValueError('--arch goes without --config, which says it')
    if args.block not in BLOCKS and not re.fullmatch(r'\d{1,4}', args.block):
        raise ValueError(
            f'--block must be first, last or a number from 0, got {args.block!r}'
        )
    if args.out.suffix == '.png' and len(args.images) > 1:
        raise ValueError(f'--out must be a folder for many pictures, got {args.out}')
    try:
        torch.empty(0, device=args.device)
    # Builds of PyTorch without a device raise AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f'--device {args.device} cannot be used here: {shorten(error, 100)}'
        ) from error


def find_stages(backbone: ClusTR, block: str) -> tuple[list[int], int]:
    """Stages to look at, and the block of each of them.

    Args:
        backbone (ClusTR): The backbone.
        block (str): 'first', 'last' or a number.

    Returns:
        tuple[list[int], int]: Stages from 0, and the block, negative from the last.

    Raises:
        ValueError: If no stage has clusters, or none has this block.
    """
    stages = clustered_stages(backbone)
    if not stages:
        raise ValueError('this backbone has no stage with clusters')
    if block in BLOCKS:
        return stages, BLOCKS[block]
    depths = {stage: len(backbone.stages[stage].blocks) for stage in stages}
    having = [stage for stage in stages if int(block) < depths[stage]]
    if not having:
        raise ValueError(
            f'--block must be first, last or up to {max(depths.values()) - 1} here, '
            f'got {block}'
        )
    return having, int(block)


def find_targets(images: Sequence[Path], out: Path, kind: str) -> list[Path]:
    """Name the result of each picture.

    Args:
        images (Sequence[Path]): The pictures.
        out (Path): Folder, or the name itself if it ends in '.png'.
        kind (str): Comes after the names of the pictures.

    Returns:
        list[Path]: Files, all different.

    Raises:
        ValueError: If a result would replace a picture.
    """
    if out.suffix == '.png':
        targets = [out]
    else:
        targets = []
        for image in images:
            number, name = 1, f'{image.stem}_{kind}.png'
            while out / name in targets:  # pictures of one name in two folders
                number += 1
                name = f'{image.stem}_{kind}_{number}.png'
            targets.append(out / name)
    sources = {image.resolve() for image in images}
    for target in targets:
        if target.resolve() in sources:
            raise ValueError(f'--out would replace the picture {target}')
    return targets


def visualize(
    path: Path,
    backbone: ClusTR,
    pixels: Pixels,
    about: Sequence[Line],
    args: argparse.Namespace,
) -> bytes:
    """Draw one picture.

    Args:
        path (Path): The picture.
        backbone (ClusTR): The backbone, on ``args.device``.
        pixels (Pixels): What its input is like.
        about (Sequence[Line]): What to say of the backbone.
        args (argparse.Namespace): The command line.

    Returns:
        bytes: A PNG file.

    Raises:
        ValueError: If the picture cannot be read or does not have the point.
    """
    picture = read_image(path)
    height, width = picture.shape[:2]
    seen = resize_image(picture, args.size, enlarge=False)
    point = None
    if args.point is not None:
        x, y = args.point
        try:
            token_at((x, y), (height, width), (height, width))
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error
        # The middle of the pixel, in the picture that the network sees.
        zoom = seen.shape[1] / width, seen.shape[0] / height
        point = ((x + 0.5) * zoom[0], (y + 0.5) * zoom[1])
    inputs = pixels.normalise(seen).to(args.device)
    stages, block = find_stages(backbone, args.block)
    maps = compute_maps(backbone, inputs, stages, block, point)
    size = f'{width} × {height} pixels'
    if seen is not picture:
        size += f', the network sees {seen.shape[1]} × {seen.shape[0]}'
    lines = [Line(path.name, TITLE, bold=True), *about, Line(size)]
    file = BytesIO()
    sheet = draw_sheet(seen, maps, lines, point, args.panel)
    Image.fromarray(sheet).save(file, 'png')
    return file.getvalue()


def find_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ClusTR that differ from the config's."""
    changes: dict[str, Any] = {}
    if args.clusterer:
        changes['clusterer'] = dict(type=CLUSTERERS[args.clusterer])
    if args.cluster_window:
        changes['clusterer'] = dict(type='DPCKNN', window=args.cluster_window)
    if args.max_clusters:
        changes['max_clusters'] = args.max_clusters
    return changes


def describe(args: argparse.Namespace) -> list[Line]:
    """Say in the picture which network this is."""
    name = args.config.stem if args.config else f'ClusTR-{args.arch or "tiny"}'
    if args.clusterer:
        name += f', {args.clusterer}'
    if args.cluster_window:
        name += f', windows of {args.cluster_window} pixels'
    if args.max_clusters:
        name += f', at most {args.max_clusters} coarse clusters'
    if args.checkpoint:
        return [Line(f'{name}, weights of {args.checkpoint.name}')]
    return [
        Line(name),
        Line('UNTRAINED: these weights are random', bold=True, colour=ALARM),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the pictures.

    Args:
        argv (Sequence[str], optional): Arguments, by default the command line's.

    Returns:
        int: Exit status: 0 if all pictures were drawn, 1 if not.
    """
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    kind = 'clusters' if args.point is None else 'attention'
    try:
        check(args)
        targets = find_targets(args.images, args.out, kind)
        backbone, pixels = load_backbone(
            args.config, args.checkpoint, args.arch or 'tiny', **find_changes(args)
        )
        backbone.to(args.device)
        find_stages(backbone, args.block)
        targets[0].parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    about = describe(args)
    failed = 0
    for number, (path, target) in enumerate(zip(args.images, targets), 1):
        place = f'[{number}/{len(targets)}] '
        start = time.monotonic()
        try:
            write_whole(target, visualize(path, backbone, pixels, about, args))
        # PyTorch says by RuntimeError that memory is short.
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            failed += 1
            print(f'{place}{shorten(error)}', file=sys.stderr, flush=True)
        else:
            seconds = time.monotonic() - start
            print(f'{place}wrote {target}, took {seconds:.1f} s', flush=True)
    if failed and len(targets) > 1:
        print(f'{failed} of {len(targets)} failed', file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
