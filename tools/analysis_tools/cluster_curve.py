"""Show how much of the tokens is lost when clusters stand for them.

That is the unexplained variance of the tokens that the attention of the last block of
a stage gets, sum |x - mean of its cluster|² / sum |x - mean of all|², over the number
of clusters of the whole map. Means are plain, while the model's are weighted. Blocks
before that cluster as the config says.
"""

import argparse
import time
from pathlib import Path
from statistics import fmean

from common import command_line, to_png
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

import clustr_mm.visualization as vis
from clustr_mm import ClusTR
from clustr_mm.files import shorten, write_whole
from clustr_mm.ops import DPCKNN, GridCells, KMeans, SortedTokens

CLUSTERERS = {
    'DPC-kNN': DPCKNN(),
    'k-means, 1 step': KMeans(1),
    'k-means, 3 steps': KMeans(3),
    'grid': GridCells(),
    'sorted': SortedTokens(),
}

#: For each asked count of clusters, the given count and the unexplained variance.
Curve = dict[int, tuple[float, float]]
#: By stage (from 1) and clusterer, the curves of all pictures.
Results = dict[int, dict[str, list[Curve]]]


def find_targets(args: argparse.Namespace) -> list[Path]:
    """Refuse what cannot be, and name the picture and the table."""
    for name, least in [('size', args.size), ('counts', min(args.counts))]:
        if least < 1:
            raise ValueError(f'--{name} must be at least 1, got {least}')
    out = args.out / 'cluster_curve' if args.out.is_dir() else args.out
    name = out.name.removesuffix('.png').removesuffix('.md')
    targets = [out.with_name(f'{name}{ending}') for ending in ('.png', '.md')]
    for target in targets:
        if target.resolve() in [path.resolve() for path in args.images]:
            raise ValueError(f'--out would replace the picture {target}')
    return targets


def watch(backbone: ClusTR, stages: list[int]) -> dict[int, tuple]:
    """Catch the tokens (B, h * w, C) and (h, w) of stages, from 1, whenever it runs."""
    allowed, seen = [stage + 1 for stage in vis.clustered_stages(backbone)], {}
    for stage in stages:
        if stage not in allowed:
            raise ValueError(f'--stages with clusters are {allowed}, got {stage}')
        module = vis.clustered_attention(backbone, stage - 1)
        module.register_forward_pre_hook(lambda _, x, s=stage: seen.update({s: x[:2]}))
    return seen


def unexplained_variance(tokens: Tensor, labels: Tensor) -> float:
    """Part of the variance of tokens (N, C) that is inside clusters, by labels (N,)."""
    tokens = tokens.double()
    sizes = labels.bincount().unsqueeze(1)
    sums = tokens.new_zeros(len(sizes), tokens.shape[1]).index_add(0, labels, tokens)
    lost = (tokens - (sums / sizes)[labels]).square().sum().item()
    total = (tokens - tokens.mean(dim=0)).square().sum().item()
    return lost / total if total else 0.0  # of equal tokens nothing is lost


def measure(tokens: Tensor, hw: tuple, counts: list[int]) -> dict[str, Curve]:
    """Cluster tokens (1, h * w, C) in all ways, into no more clusters than tokens."""
    counts = sorted({count for count in counts if count <= tokens.shape[1]})
    curves: dict[str, Curve] = {name: {} for name in CLUSTERERS}
    for name, clusterer in CLUSTERERS.items():
        # k-means would find one scale from another. For DPC-kNN all are apart, and
        # most of the work is the same.
        together = isinstance(clusterer, DPCKNN)
        for scales in [counts] if together else [[count] for count in counts]:
            found = clusterer(tokens, hw, scales)
            for asked, labels, given in zip(scales, found.labels, found.counts):
                curves[name][asked] = given, unexplained_variance(tokens[0], labels[0])
    return curves


def average(curves: list[Curve]) -> Curve:
    """Mean over the pictures that have as many tokens."""
    found = {n: [c[n] for c in curves if n in c] for n in sorted(set().union(*curves))}
    return {count: tuple(map(fmean, zip(*points))) for count, points in found.items()}


def draw(results: Results, title: str, colour: str) -> bytes:
    """Draw a panel for each stage, as a PNG file."""
    figure = Figure(figsize=(2 + 4.5 * len(results), 5), layout='constrained')
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for axis, (stage, curves) in zip(panels, results.items()):
        for i, (name, singles) in enumerate(curves.items()):
            mean = zip(*average(singles).values())
            axis.plot(*mean, f'C{i}-', marker='os^Dv'[i], ms=5, label=name)
            for single in singles:
                axis.plot(*zip(*single.values()), f'C{i}-', lw=0.8, alpha=0.35)
        axis.axhline(1, color='grey', lw=0.8)  # what a single cluster loses
        # Zero, where every token is a cluster, has no place on such an axis.
        axis.set_yscale('log', nonpositive='mask')
        axis.set(xscale='log', title=f'stage {stage}, last block', xlabel='clusters')
        axis.set_xticks(counts := list(average(curves['grid'])), counts)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter('{x:g}')
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    panels[0].set_ylabel('unexplained variance, mean and each picture (thin)')
    panels[0].legend(frameon=False)
    figure.suptitle(title.replace(', ', '\n', 1), color=colour, weight='bold')
    return to_png(figure)


def to_markdown(results: Results, title: str, images: list[Path]) -> str:
    """Write the means as a table."""
    lines = [
        f'Unexplained variance of tokens, {title}.',
        'In brackets the clusters given',
    ]
    lines[1] += f' where not as asked. Mean over {", ".join(p.name for p in images)}.'
    lines += ['', f'| stage | clusters | pictures | {" | ".join(CLUSTERERS)} |']
    lines += ['|--:' * (3 + len(CLUSTERERS)) + '|']
    for stage, curves in results.items():
        means = [average(singles) for singles in curves.values()]
        for asked in means[0]:
            pictures = sum(asked in single for single in curves['grid'])
            cells = [f'| {stage} | {asked} | {pictures} |']
            for given, lost in (mean[asked] for mean in means):
                other = '' if given == asked else f' ({given:.4g})'
                cells.append(f'{lost:.4f}{other} |')
            lines.append(' '.join(cells))
    return '\n'.join(lines) + '\n'


def run(args: argparse.Namespace) -> None:
    """Measure, draw and write."""
    targets = find_targets(args)
    whole = map(vis.read_image, args.images)
    pictures = [vis.resize_image(image, args.size, enlarge=False) for image in whole]
    arch = args.arch or 'tiny'
    backbone, pixels = vis.load_backbone(args.config, args.checkpoint, arch)
    seen = watch(backbone, args.stages)
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    results: Results = {s: {name: [] for name in CLUSTERERS} for s in args.stages}
    for number, (path, picture) in enumerate(zip(args.images, pictures), 1):
        start = time.monotonic()
        with vis.evaluating(backbone):
            backbone(pixels.normalise(picture))
        for stage, (tokens, hw) in seen.items():
            if min(args.counts) > tokens.shape[1]:  # no mean without it in silence
                most = f'{tokens.shape[1]}, the tokens of {path} in stage {stage}'
                raise ValueError(f'--counts must have one up to {most}')
            for name, curve in measure(tokens, hw, args.counts).items():
                results[stage][name].append(curve)
        sizes = ' and '.join(str(tokens.shape[1]) for tokens, _ in seen.values())
        took = f'{sizes} tokens, took {time.monotonic() - start:.1f} s'
        print(f'[{number}/{len(pictures)}] {path}: {took}', flush=True)
    title = args.config.stem if args.config else f'ClusTR-{arch}'
    weights = args.checkpoint and f'weights of {args.checkpoint.name}'
    title += f', {weights or "UNTRAINED: random weights"}'
    table = to_markdown(
        results, f'{title}; longer side at most {args.size}', args.images
    )
    write_whole(targets[0], draw(results, title, 'black' if weights else 'red'))
    write_whole(targets[1], table.encode())
    print(f'\n{table}\nwrote {targets[0]} and {targets[1]}')


def main(argv: list[str] | None = None) -> None:
    """Run the tool; an error takes one line and exits with status 2."""
    parser = command_line('cluster_curve.py', __doc__)
    add, counts = parser.add_argument, [16, 49, 196, 784]
    add('images', nargs='+', type=Path, metavar='IMAGE')
    either = parser.add_mutually_exclusive_group().add_argument
    either('--config', type=Path, help='of a backbone or of a model that has it')
    either('--arch', choices=list(ClusTR.arch_zoo), help='without --config; tiny')
    add('--checkpoint', type=Path, help='without it weights are random')
    add('--size', type=int, default=512, help='shrink to this longer side (512)')
    add('--stages', type=int, nargs='+', default=[1, 2], help='from 1 (1 2)')
    add('--counts', type=int, nargs='+', default=counts, help='clusters (%(default)s)')
    add('--out', type=Path, default='work_dirs/cluster_curve', help='gets .png and .md')
    args = parser.parse_intermixed_args(argv)
    try:
        run(args)
    # PyTorch says by RuntimeError that memory is short.
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        parser.error(shorten(error))


if __name__ == '__main__':
    main()
