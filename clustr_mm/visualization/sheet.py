"""A sheet of captioned pictures: clusters, weights and attention of one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .clusters import SCALES, ClusterMap
from .drawing import (
    apply_colours,
    draw_clusters,
    draw_dots,
    draw_heat,
    draw_point,
    resize_image,
)

MARGIN = 16
GAP = 14
TEXT = 15
TITLE = 18
LEADING = 1.35

INK = (30, 30, 30)
ALARM = (200, 30, 20)

#: Colour maps, of weights from below to above the mean, and of attention.
WEIGHT_COLOURS = 'RdBu_r'
HEAT_COLOURS = 'inferno'

#: Where the scale of the weights may end, as multiples of the mean.
ENDS = (1.1, 1.2, 1.5, 2, 3, 5, 10, 30, 100)


@dataclass
class Line:
    """A line of text.

    Attributes:
        text (str): The text.
        size (int): Height of the font in pixels. Defaults to that of captions.
        bold (bool): Whether it is bold. Defaults to False.
        colour (tuple[int, int, int]): RGB. Defaults to nearly black.
    """

    text: str
    size: int = TEXT
    bold: bool = False
    colour: tuple[int, int, int] = INK

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(np.ceil(_font(self.size, self.bold).getlength(self.text)))

    @property
    def height(self) -> int:
        """Height in pixels, with the space to the next line."""
        return round(self.size * LEADING)


@dataclass
class Bar:
    """A scale of colours.

    Attributes:
        colours (str): Name of a colour map of Matplotlib.
        ticks (Sequence[str]): Labels at equal distances, those of the ends included.
        text (str): What it is the scale of.
    """

    colours: str
    ticks: Sequence[str]
    text: str


@dataclass
class Row:
    """Pictures beside each other under a title.

    Attributes:
        title (str): Above the row.
        pictures (list[np.ndarray]): (H, W, 3) uint8 RGB, of one size for all rows.
        captions (list[str]): Above each picture.
    """

    title: str
    pictures: list[np.ndarray] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """The font that comes with Matplotlib, the same on every machine."""
    import matplotlib

    name = f'fonts/ttf/DejaVuSans{"-Bold" if bold else ""}.ttf'
    return ImageFont.truetype(Path(matplotlib.get_data_path(), name), size)


def draw_sheet(
    image: np.ndarray,
    maps: Sequence[ClusterMap],
    lines: Sequence[Line],
    point: tuple[float, float] | None = None,
    longer: int = 448,
) -> np.ndarray:
    """Draw the clusters of all maps, and beside them weights or attention.

    Args:
        image (np.ndarray): (H, W, 3) uint8 RGB, at any resolution.
        maps (Sequence[ClusterMap]): Of that image, both scales of each stage.
        lines (Sequence[Line]): Text at the top.
        point (tuple[float, float], optional): x and y of the query in pixels of the
            image, if the maps have attention, which then takes the place of the
            weights. Defaults to None.
        longer (int): Longer side of each picture in pixels. Defaults to 448,
            where a token of an image of this size has 4 pixels or more a side.

    Returns:
        np.ndarray: (H', W', 3) uint8 RGB.
    """
    picture = resize_image(image, longer)
    mark = None
    if point is not None:
        zoom = picture.shape[1] / image.shape[1], picture.shape[0] / image.shape[0]
        mark = (point[0] * zoom[0], point[1] * zoom[1])
    rows: dict[tuple[int, int], Row] = {}
    end = _weight_range(maps)
    for found in maps:
        h, w = found.labels.shape
        row = rows.setdefault(
            (found.stage, found.block),
            Row(
                f'Stage {found.stage + 1} (stages.{found.stage}.blocks.{found.block}): '
                f'stride {found.stride}, {w} × {h} = {h * w:,} tokens'
            ),
        )
        row.pictures.append(_draw_clusters(picture, found))
        row.captions.append(_describe(found))
        if found.attention is None:
            row.pictures.append(_draw_weights(picture, found, end))
            row.captions.append(
                'weights: all 1'
                if found.is_trivial
                else f'weights in {SCALES[found.scale]} clusters'
            )
        else:
            heat = found.attention.mean(dim=0) * found.labels.numel()
            # Even attention must not look like a peak everywhere.
            top = max(float(heat.max()), 4)
            # Of the square root, or the greatest of all would be all there is to see.
            drawn = draw_heat(picture, heat.sqrt(), 0, top**0.5, HEAT_COLOURS)
            row.pictures.append(drawn)
            row.captions.append(f'attention: 0 to {top:.3g} × mean')
    cells = [picture, *(cell for row in rows.values() for cell in row.pictures)]
    legend = ['clusters: mean colour, white borders, yellow centres']
    if mark is None:
        bar = Bar(
            WEIGHT_COLOURS,
            (f'{1 / end:.2g}', '1', f'{end:g}'),
            'weights: of a token in the merge, over the mean in its cluster',
        )
    else:
        cells = [draw_point(cell, *mark) for cell in cells]
        legend.append('green: the token that attends')
        bar = Bar(
            HEAT_COLOURS,
            ('0', '¼', 'end'),
            'attention to each token by way of its cluster; the end is above each map',
        )
    first, *cells = cells
    rest = iter(cells)
    for row in rows.values():
        row.pictures = [next(rest) for _ in row.pictures]
    lines = [*lines, *map(Line, legend)]
    return _compose(first, lines, bar, list(rows.values()))


def _draw_clusters(picture: np.ndarray, found: ClusterMap) -> np.ndarray:
    if found.is_trivial:
        # Borders and centres everywhere would say nothing.
        return draw_clusters(picture, found.labels, opacity=1, border=None)
    # Many thin lines hide as much as few strong ones.
    strength = 0.4 if _token_side(picture, found) < 8 else 0.6
    drawn = draw_clusters(picture, found.labels, border_opacity=strength)
    return draw_dots(drawn, found.centres, (255, 225, 0))


def _draw_weights(picture: np.ndarray, found: ClusterMap, end: float) -> np.ndarray:
    weights = found.relative_weights.clamp(min=1e-6).log()
    limit = float(np.log(end))
    return draw_heat(picture, weights, -limit, limit, WEIGHT_COLOURS)


def _token_side(picture: np.ndarray, found: ClusterMap) -> float:
    """Shorter side of a token in pixels of the picture."""
    return min(np.array(picture.shape[:2]) / np.array(found.labels.shape))


def _describe(found: ClusterMap) -> str:
    if found.is_trivial:
        return f'{SCALES[found.scale]}: one cluster per token'
    return f'{SCALES[found.scale]}: {found.num_clusters:,} clusters'


def _weight_range(maps: Sequence[ClusterMap]) -> float:
    """Multiple of the mean that nearly all weights and their inverses stay below."""
    logs = [found.relative_weights.clamp(min=1e-6).log() for found in maps]
    needed = max((float(log.abs().quantile(0.98)) for log in logs), default=0)
    return next((end for end in ENDS if np.log(end) >= needed), ENDS[-1])


def _compose(
    picture: np.ndarray, lines: Sequence[Line], bar: Bar, rows: Sequence[Row]
) -> np.ndarray:
    """Lay out the sheet: picture and text at the top, then row by row."""
    height, width = picture.shape[:2]
    count = max(len(row.pictures) for row in rows)
    captions = [Line(text) for row in rows for text in row.captions]
    column = max(width, *(line.width for line in captions))
    titles = [Line(row.title, bold=True) for row in rows]
    text_width = max([_bar_width(bar), *(line.width for line in lines)])
    total = max(
        count * column + (count - 1) * GAP,
        column + GAP + text_width,
        *(line.width for line in titles),
    )
    text_height = sum(line.height for line in lines) + GAP + _BAR_HEIGHT
    head = max(height, text_height)
    row_height = titles[0].height + captions[0].height + height + GAP
    size = (total + 2 * MARGIN, head + GAP + len(rows) * row_height + 2 * MARGIN)
    sheet = Image.new('RGB', size, (255, 255, 255))
    pen = ImageDraw.Draw(sheet)

    sheet.paste(Image.fromarray(picture), (MARGIN, MARGIN))
    left, y = MARGIN + column + GAP, MARGIN
    for line in lines:
        _write(pen, (left, y), line)
        y += line.height
    _draw_bar(sheet, pen, (left, y + GAP), bar)

    y = MARGIN + head + GAP
    for row, title in zip(rows, titles):
        _write(pen, (MARGIN, y), title)
        for i, (cell, text) in enumerate(zip(row.pictures, row.captions)):
            x = MARGIN + i * (column + GAP)
            _write(pen, (x, y + title.height), Line(text))
            below = y + title.height + captions[0].height
            sheet.paste(Image.fromarray(cell), (x, below))
        y += row_height
    return np.array(sheet)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], line: Line) -> None:
    pen.text(place, line.text, line.colour, _font(line.size, line.bold))


_BAR_LENGTH = 260
_BAR_THICKNESS = 14
_BAR_HEIGHT = _BAR_THICKNESS + 2 * round(TEXT * LEADING)


def _bar_width(bar: Bar) -> int:
    ends = Line(bar.ticks[-1]).width
    return max(_BAR_LENGTH + ends, Line(bar.text).width)


def _draw_bar(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, place: tuple[int, int], bar: Bar
) -> None:
    x, y = place
    _write(pen, (x, y), Line(bar.text))
    y += Line('').height
    colours = apply_colours(np.linspace(0, 1, _BAR_LENGTH), bar.colours)
    strip = np.repeat(colours[None].round().astype(np.uint8), _BAR_THICKNESS, axis=0)
    sheet.paste(Image.fromarray(strip), (x, y))
    y += _BAR_THICKNESS + 2
    for i, text in enumerate(bar.ticks):
        tick = Line(text)
        at = x + round(_BAR_LENGTH * i / (len(bar.ticks) - 1))
        _write(pen, (max(x, at - tick.width // 2), y), tick)
