"""One figure: clusters, and the weights in them or the attention of a point."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from .clusters import SCALES, ClusterMap
from .loading import resize_image

#: In points, as all lengths but those of pictures.
MARGIN, LINE = 16, 20
#: Least width of a panel with the gap beside it, for its caption, and the height of
#: colour bar, title and caption between two panels.
COLUMN, BETWEEN = 216, 84

CAPTION = dict(fontsize=14, loc='left', pad=4)
YELLOW, GREEN, RED = '#ffe100', '#5aff5a', '#c81e14'


def import_libraries() -> tuple[ModuleType, ModuleType]:
    """Import matplotlib and scikit-image, which nothing but drawing needs.

    Raises:
        ImportError: If one is missing, with what to do.
    """
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
        import skimage.color
    except ImportError as error:
        raise ImportError(
            f'drawing needs matplotlib and scikit-image ({error}): '
            "pip install 'clustr_mm[tools]'"
        ) from error
    return matplotlib, skimage


def resize_labels(labels: np.ndarray | Tensor, height: int, width: int) -> np.ndarray:
    """Give each pixel of a picture (height, width) the label (h, w) of its token.

    Raises:
        ValueError: If ``labels`` is no map of integers.
    """
    if isinstance(labels, Tensor):
        labels = labels.cpu().numpy()
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            'labels must be integers of shape (h, w), got '
            f'{labels.dtype} of shape {labels.shape}'
        )
    rows = np.arange(height) * labels.shape[0] // height
    columns = np.arange(width) * labels.shape[1] // width
    return labels[rows[:, None], columns]


def draw_clusters(
    image: np.ndarray,
    labels: np.ndarray | Tensor,
    opacity: float = 0.8,
    border: float = 1.0,
) -> np.ndarray:
    """Tint each cluster of tokens with the mean colour of its pixels and outline it.

    Args:
        image (np.ndarray): (H, W, 3) uint8 RGB.
        labels (np.ndarray or Tensor): (h, w), integer, not negative; the label
            of each token. The tokens cover the image.
        opacity (float): Share of the tint, in [0, 1]. Defaults to 0.8.
        border (float): Share of white in the outline, in [0, 1]. Defaults to 1.

    Returns:
        np.ndarray: (H, W, 3) uint8 RGB, a new array.

    Raises:
        ValueError: If an argument is not as stated.
    """
    _, skimage = import_libraries()
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            'image must be uint8 of shape (H, W, 3), got '
            f'{image.dtype} of shape {image.shape}'
        )
    for name, value in [('opacity', opacity), ('border', border)]:
        if not 0 <= value <= 1:
            raise ValueError(f'{name} must be in [0, 1], got {value!r}')
    labels = resize_labels(labels, *image.shape[:2])
    if labels.min() < 0:
        raise ValueError(f'labels must not be negative, got {labels.min()}')
    tint = skimage.color.label2rgb(labels, image.astype(float), kind='avg', bg_label=-1)
    drawn = (1 - opacity) * image + opacity * tint
    # Lines of one pixel; those of scikit-image, of two, would fill small tokens.
    edges = np.diff(labels, axis=0, append=labels[-1:]) != 0
    edges |= np.diff(labels, axis=1, append=labels[:, -1:]) != 0
    drawn[edges] += border * (255 - drawn[edges])
    return drawn.round().astype(np.uint8)


def draw_figure(
    image: np.ndarray,
    maps: Sequence[ClusterMap],
    title: str,
    about: Sequence[str] = (),
    alarm: str = '',
    point: tuple[float, float] | None = None,
    longer: int = 448,
) -> np.ndarray:
    """Draw the clusters of all maps, and beside them weights or attention.

    Args:
        image (np.ndarray): (H, W, 3) uint8 RGB, at any resolution.
        maps (Sequence[ClusterMap]): Of that image, both scales of each stage.
        title (str): The line at the top.
        about (Sequence[str]): Lines below the title.
        alarm (str): A line below these, in red.
        point (tuple[float, float], optional): x and y of the query in pixels of the
            image, if the maps have attention, which then takes the place of the
            weights. Defaults to None.
        longer (int): Longer side of each picture in pixels. Defaults to 448,
            where a token of an image of this size has 4 pixels or more a side.

    Returns:
        np.ndarray: (H', W', 3) uint8 RGB.
    """
    matplotlib, _ = import_libraries()
    picture = resize_image(image, longer)
    # A point is a pixel, or several, for text that suits large pictures. Their size is
    # such that each panel has just as many pixels as its picture.
    scale = max(1, round(longer / 256))
    height, width = np.array(picture.shape[:2]) / scale
    gap = max(MARGIN, COLUMN - width)
    total_width = MARGIN + 5 * (width + gap)
    legend = 'clusters: mean colour, white borders'
    if any(found.centres is not None for found in maps):
        legend += '; yellow: the token that a cluster of several grew from'
    if point is not None:
        legend += '; green: the point that attends'
    heading = [
        (line, style)
        for text, style in [
            (title, dict(fontsize=18, weight='bold')),
            *((text, dict(fontsize=14)) for text in [*about, legend]),
            (alarm, dict(fontsize=14, weight='bold', color=RED)),
        ]
        for line in textwrap.wrap(text, int(total_width / style['fontsize'] * 1.6))
    ]
    rows = len(maps) // 2
    top = MARGIN + len(heading) * LINE + 4 * MARGIN
    total_height = top + rows * (height + BETWEEN) - 2 * MARGIN
    # Not of pyplot, whose figures and back-end belong to the program around this.
    size = np.array([total_width, total_height]) / 72
    figure = matplotlib.figure.Figure(size, 72 * scale, facecolor='white')
    for number, (text, style) in enumerate(heading, 1):
        y = 1 - (MARGIN + number * LINE) / total_height
        figure.text(MARGIN / total_width, y, text, parse_math=False, **style)
    axes = figure.subplots(rows, 5, squeeze=False)
    figure.subplots_adjust(
        left=MARGIN / total_width,
        right=1 - gap / total_width,
        top=1 - top / total_height,
        bottom=(BETWEEN - 2 * MARGIN) / total_height,
        wspace=gap / width,
        hspace=BETWEEN / height,
    )
    end = _weight_range(maps)
    for row, coarse, fine in zip(axes, maps[::2], maps[1::2]):
        h, w = coarse.labels.shape
        row[0].imshow(picture)
        row[0].annotate(
            f'Stage {coarse.stage + 1} (stages.{coarse.stage}.blocks.{coarse.block}): '
            f'stride {coarse.stride}, {w} × {h} = {h * w:,} tokens',
            (0, height + LINE + 6),
            xycoords='axes points',
            fontsize=14,
            weight='bold',
        )
        for found, left, right in zip((coarse, fine), row[1::2], row[2::2]):
            _show_clusters(left, picture, found)
            _show_heat(right, picture, found, end)
        for axis in row:
            axis.set_axis_off()
            if point is not None:
                x, y = np.array(point) * len(picture) / len(image) - 0.5
                for colour, thickness in [('black', 5), (GREEN, 3)]:
                    ring = dict(mec=colour, mew=thickness, mfc='none', ms=14)
                    axis.plot(
                        x, y, 'o', clip_on=False, scalex=False, scaley=False, **ring
                    )
    canvas = matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _show_clusters(axis: Any, picture: np.ndarray, found: ClusterMap) -> None:
    (height, width), (h, w) = picture.shape[:2], found.labels.shape
    side = min(height / h, width / w)
    if found.is_trivial:
        # Borders and centres everywhere would say nothing.
        axis.imshow(draw_clusters(picture, found.labels, opacity=1, border=0))
        axis.set_title(f'{SCALES[found.scale]}: one cluster per token', **CAPTION)
        axis.annotate(
            'nothing\nis merged',
            (0.5, 0.06),
            xycoords='axes fraction',
            fontsize=14,
            ha='center',
            va='bottom',
            bbox=dict(facecolor='white', edgecolor='none', alpha=0.85),
        )
        return
    # Many lines hide as much as few strong ones.
    strength = 0.5 if side < 8 else 0.8
    axis.imshow(draw_clusters(picture, found.labels, border=strength))
    empty = int((found.sizes == 0).sum())
    caption = f'{SCALES[found.scale]}: {found.num_clusters:,} clusters'
    axis.set_title(caption + (f', {empty:,} empty' if empty else ''), **CAPTION)
    if found.centres is not None:
        # A token that is a cluster by itself needs no mark.
        marked = found.centres & (found.sizes[found.labels] > 1)
        y, x = (marked.nonzero().numpy().T + 0.5) * [[height / h], [width / w]]
        size = min(max(side / axis.figure.dpi * 36, 4), 7)  # half a token's
        dots = dict(mfc=YELLOW, mec='black', mew=size / 8, ms=size)
        axis.plot(x - 0.5, y - 0.5, 'o', scalex=False, scaley=False, **dots)


def _show_heat(axis: Any, picture: np.ndarray, found: ClusterMap, end: float) -> None:
    """Weights, or the mean attention of the heads, over the picture in grey."""
    from matplotlib.colors import LogNorm, PowerNorm

    height, width = picture.shape[:2]
    values, colours, norm = found.relative_weights, 'RdBu_r', LogNorm(1 / end, end)
    caption, ticks = 'weight, × mean in cluster', (1 / end, 1, end)
    if found.attention is not None:
        values, colours = found.attention.mean(dim=0) * values.numel(), 'inferno'
        # Even attention must not look like a peak everywhere.
        end = max(float(values.max()), 4)
        # Of the square root, or the greatest of all would be all there is to see.
        norm = PowerNorm(0.5, 0, end)
        caption, ticks = 'attention, × mean', (0, end / 4, end)
    elif found.is_trivial:
        caption, ticks = 'weights: all 1', None
    axis.set_title(caption, **CAPTION)
    axis.imshow(picture @ np.array([0.299, 0.587, 0.114]), 'gray', vmin=0, vmax=255)
    place = dict(extent=(-0.5, width - 0.5, height - 0.5, -0.5), aspect='auto')
    shown = axis.imshow(
        values, colours, norm=norm, alpha=0.7, interpolation='nearest', **place
    )
    if ticks:
        unit = axis.figure.dpi / 72 / height
        place = axis.inset_axes((0, -16 * unit, 1, 8 * unit))
        bar = axis.figure.colorbar(
            shown, place, orientation='horizontal', format='{x:.2g}', ticks=ticks
        )
        bar.minorticks_off()
        bar.ax.tick_params(labelsize=12, length=2, pad=1)


def _weight_range(maps: Sequence[ClusterMap]) -> float:
    """Multiple of the mean that nearly all weights and their inverses stay below."""
    logs = [found.relative_weights.clamp(min=1e-6).log().abs() for found in maps]
    return max(1.1, *(float(log.quantile(0.98).exp()) for log in logs))
