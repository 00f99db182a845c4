"""Small drawn data sets in the layouts of the real ones.

They let the stock runners, pipelines and metrics of the toolboxes run from end
to end within minutes and without a download.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Name -> (label in the annotation files, colour), both as in ADE20K.
ADE_CLASSES: dict[str, tuple[int, tuple[int, int, int]]] = {
    'building': (2, (180, 120, 120)),
    'sky': (3, (6, 230, 230)),
    'tree': (5, (4, 200, 3)),
    'grass': (10, (4, 250, 7)),
    'person': (13, (150, 5, 61)),
    'mountain': (17, (143, 255, 140)),
    'car': (21, (0, 102, 200)),
    'sea': (27, (9, 7, 230)),
    'boat': (77, (173, 255, 0)),
    'ball': (120, (255, 0, 163)),
}

# Raise it when the drawings change: a set of an older version is drawn anew.
_VERSION = 1
_RECORD = 'toy_data.json'
_SPLITS = ('training', 'validation')


class _Canvas:
    """An image and its labels, painted over from back to front.

    Coordinates are fractions of the side, x to the right and y downwards.

    Args:
        side (int): Height and width in pixels.
        rng (np.random.Generator): Source of everything random.
    """

    def __init__(self, side: int, rng: np.random.Generator) -> None:
        self.side = side
        self.rng = rng
        self.image = np.zeros((side, side, 3), np.float32)
        self.labels = np.zeros((side, side), np.uint8)
        centres = (np.arange(side, dtype=np.float32) + 0.5) / side
        self.x, self.y = np.meshgrid(centres, centres)

    def paint(
        self, mask: np.ndarray, colour: np.ndarray, name: str | None = None
    ) -> None:
        """Set the pixels of ``mask``; their label too if ``name`` is given.

        Args:
            mask (np.ndarray): (side, side), bool.
            colour (np.ndarray): (3,) or (side, side, 3), RGB about [0, 1].
            name (str, optional): A key of ``ADE_CLASSES``.
        """
        self.image[mask] = np.broadcast_to(colour, self.image.shape)[mask]
        if name is not None:
            self.labels[mask] = ADE_CLASSES[name][0]

    def noise(self, height: float, width: float, slant: float = 0.0) -> np.ndarray:
        """Smooth noise of zero mean and unit deviation, (side, side).

        Args:
            height (float): Height of a grain as a fraction of the side.
            width (float): Width of a grain as a fraction of the side.
            slant (float): How far a grain leans, in widths per height.
                Defaults to 0, upright.
        """
        from PIL import Image

        cells = (int(np.ceil(1 / width)) + 3, int(np.ceil(1 / height)) + 3)
        grid = self.rng.standard_normal(cells[::-1]).astype(np.float32)
        field = Image.fromarray(grid).resize(
            (self.side, self.side), Image.Resampling.BICUBIC
        )
        field = np.array(field)
        if slant:
            shift = (np.arange(self.side) * slant).astype(int)
            columns = (np.arange(self.side) + shift[:, None]) % self.side
            field = np.take_along_axis(field, columns, axis=1)
        return (field - field.mean()) / (field.std() + 1e-6)

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> np.ndarray:
        """Mask of an ellipse given by its centre and half axes."""
        return ((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2 <= 1

    def box(self, left: float, top: float, right: float, bottom: float) -> np.ndarray:
        """Mask of an upright rectangle."""
        return (self.x >= left) & (self.x < right) & (self.y >= top) & (self.y < bottom)

    def trapezoid(
        self,
        top: tuple[float, float, float],
        bottom: tuple[float, float, float],
    ) -> np.ndarray:
        """Mask between two level edges, each given as (left, right, y)."""
        along = (self.y - top[2]) / (bottom[2] - top[2])
        left = top[0] + along * (bottom[0] - top[0])
        right = top[1] + along * (bottom[1] - top[1])
        inside = (along >= 0) & (along < 1)
        return inside & (self.x >= left) & (self.x < right)


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB colour, (3,) float32, from parts in [0, 1]; the hue may overflow."""
    offset = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    chroma = np.clip(np.minimum(offset, 4 - offset), 0, 1)
    return (value * (1 - saturation * chroma)).astype(np.float32)


def _any_colour(
    rng: np.random.Generator, saturation: tuple[float, float] = (0.4, 0.9)
) -> np.ndarray:
    """A colour of any hue, neither black nor white."""
    return _hsv(rng.uniform(), rng.uniform(*saturation), rng.uniform(0.45, 0.95))


def _grained(colour: np.ndarray, grain: np.ndarray, amount: float) -> np.ndarray:
    """(H, W, 3): ``colour`` made lighter and darker by ``grain``, (H, W)."""
    return colour * (1 + amount * grain[..., None])


def _draw_sky(canvas: _Canvas) -> None:
    """A gradient in one of several weathers with soft clouds."""
    rng = canvas.rng
    weathers = (
        ((0.58, 0.65, 0.85), (0.55, 0.25, 0.95)),
        ((0.66, 0.50, 0.60), (0.07, 0.45, 0.95)),
        ((0.58, 0.08, 0.65), (0.58, 0.04, 0.85)),
        ((0.48, 0.40, 0.65), (0.14, 0.25, 0.90)),
    )
    high, low = weathers[rng.integers(len(weathers))]
    depth = np.clip(canvas.y * rng.uniform(1.6, 2.2), 0, 1)[..., None]
    sky = (1 - depth) * _hsv(*high) + depth * _hsv(*low)
    clouds = canvas.noise(0.10, 0.30) + 0.5 * canvas.noise(0.05, 0.15)
    veil = np.clip(0.5 * clouds - rng.uniform(-0.1, 0.5), 0, 0.8)[..., None]
    canvas.paint(canvas.y < 2, sky * (1 - veil) + veil * _hsv(0.1, 0.03, 0.97), 'sky')


def _draw_mountain(canvas: _Canvas, horizon: float) -> None:
    """A ridge with slanted rock faces, at times capped with snow."""
    rng = canvas.rng
    height = rng.uniform(0.26, 0.36)
    ridge = canvas.noise(1.0, rng.uniform(0.2, 0.35))[:1]
    ridge = (ridge - ridge.min()) / np.ptp(ridge)
    top = horizon - height * (0.45 + 0.55 * ridge)
    top = top - 0.008 * canvas.noise(1.0, 0.03)[:1]
    mask = (canvas.y >= top) & (canvas.y < horizon + 0.02)
    rock = _hsv(rng.uniform(), rng.uniform(0.05, 0.2), rng.uniform(0.3, 0.5))
    faces = canvas.noise(0.08, 0.025, 0.8) + 0.7 * canvas.noise(0.08, 0.025, -0.8)
    canvas.paint(mask, _grained(rock, faces, 0.2), 'mountain')
    if rng.random() < 0.3:
        cap = mask & (canvas.y < horizon - 0.75 * height - 0.02 * faces)
        canvas.paint(cap, _grained(_hsv(0.6, 0.05, 0.95), faces, 0.04))


def _draw_sea(canvas: _Canvas, mask: np.ndarray, horizon: float) -> None:
    """Level waves that grow towards the viewer."""
    rng = canvas.rng
    water = _hsv(
        rng.uniform(0.46, 0.66), rng.uniform(0.35, 0.75), rng.uniform(0.45, 0.75)
    )
    near = np.clip((canvas.y - horizon) / (1 - horizon), 0, 1)
    waves = (1 - near) * canvas.noise(0.012, 0.08) + near * canvas.noise(0.025, 0.16)
    canvas.paint(mask, _grained(water, waves, 0.17), 'sea')
    glint = mask & (waves > 1.6)
    canvas.paint(glint, 0.4 * water + 0.6)


def _draw_grass(canvas: _Canvas, mask: np.ndarray) -> None:
    """Upright blades over larger patches, from lush to dry."""
    rng = canvas.rng
    turf = _hsv(rng.uniform(0.10, 0.38), rng.uniform(0.35, 0.75), rng.uniform(0.4, 0.7))
    blades = canvas.noise(0.045, 0.010) + 0.5 * canvas.noise(0.15, 0.2)
    canvas.paint(mask, _grained(turf, blades, 0.2), 'grass')


def _draw_shadow(canvas: _Canvas, x: float, y: float, width: float) -> None:
    """Darken the ground below a thing."""
    canvas.image[canvas.ellipse(x, y, 0.6 * width, 0.08 * width)] *= 0.6


def _draw_building(canvas: _Canvas, x: float, base: float, size: float) -> None:
    """A wall of storeys with rows of windows, flat or gabled."""
    rng = canvas.rng
    width, height = size * rng.uniform(0.7, 1.2), size * rng.uniform(0.8, 1.3)
    left, right, top = x - width / 2, x + width / 2, base - height
    wall = _any_colour(rng, (0.1, 0.45))
    courses = np.where((canvas.y - top) % 0.022 < 0.005, 0.85, 1.0)[..., None]
    canvas.paint(
        canvas.box(left, top, right, base),
        _grained(wall, canvas.noise(0.01, 0.01), 0.05) * courses,
        'building',
    )
    if rng.random() < 0.5:
        roof = _any_colour(rng, (0.3, 0.7)) * 0.7
        gable = canvas.trapezoid(
            (x - 0.02, x + 0.02, top - 0.3 * width),
            (left - 0.02, right + 0.02, top),
        )
        tiles = np.where((canvas.y - top) % 0.03 < 0.01, 0.75, 1.0)[..., None]
        canvas.paint(gable, roof * tiles, 'building')
    columns = int(rng.integers(3, 6))
    rows = max(2, round(columns * height / width))
    across = (canvas.x - left) / width * columns % 1
    down = (canvas.y - top) / height * rows % 1
    panes = canvas.box(left, top, right, base)
    panes &= (abs(across - 0.5) < 0.27) & (abs(down - 0.5) < 0.3)
    glass = _hsv(0.6, 0.4, 0.25) if rng.random() < 0.6 else _hsv(0.13, 0.4, 0.95)
    canvas.paint(panes, _grained(glass, canvas.noise(0.03, 0.03), 0.15))


def _draw_tree(canvas: _Canvas, x: float, base: float, size: float) -> None:
    """A speckled crown on a trunk: round, or pointed like a fir."""
    rng = canvas.rng
    trunk = canvas.box(x - 0.07 * size, base - 0.45 * size, x + 0.07 * size, base)
    bark = _hsv(0.07, 0.5, rng.uniform(0.25, 0.45))
    canvas.paint(trunk, _grained(bark, canvas.noise(0.1, 0.008), 0.2), 'tree')
    crown = np.zeros_like(trunk)
    if rng.random() < 0.35:
        for step in range(3):
            top = base - size * (1.3 - 0.33 * step)
            half = size * (0.25 + 0.09 * step)
            crown |= canvas.trapezoid(
                (x - 0.01, x + 0.01, top), (x - half, x + half, top + 0.5 * size)
            )
    else:
        for angle in np.linspace(0, 2 * np.pi, 7, endpoint=False):
            crown |= canvas.ellipse(
                x + 0.24 * size * np.cos(angle),
                base - 0.8 * size + 0.24 * size * np.sin(angle),
                size * rng.uniform(0.17, 0.27),
                size * rng.uniform(0.17, 0.27),
            )
        crown |= canvas.ellipse(x, base - 0.8 * size, 0.3 * size, 0.3 * size)
    hue = rng.choice([rng.uniform(0.18, 0.42), rng.uniform(-0.1, 0.15)], p=[0.65, 0.35])
    leaves = _hsv(hue, rng.uniform(0.4, 0.8), rng.uniform(0.3, 0.55))
    light = 1 + 0.6 * ((x - canvas.x) + (base - 0.8 * size - canvas.y)) / size
    speckle = _grained(leaves, canvas.noise(0.018, 0.018), 0.35)
    canvas.paint(crown, speckle * light[..., None], 'tree')


def _draw_car(canvas: _Canvas, x: float, base: float, size: float) -> None:
    """A car from the side."""
    rng = canvas.rng
    half, wheel = 0.62 * size, 0.15 * size
    facing = rng.choice([-1, 1])
    body = canvas.box(x - half, base - 0.42 * size, x + half, base - 0.5 * wheel)
    for end in (-1, 1):
        corner = canvas.box(
            *sorted((x + end * half, x + end * (half - 0.1 * size)))[:1],
            base - 0.42 * size,
            max(x + end * half, x + end * (half - 0.1 * size)),
            base - 0.32 * size,
        )
        body &= ~corner | canvas.ellipse(
            x + end * (half - 0.1 * size), base - 0.32 * size, 0.1 * size, 0.1 * size
        )
    middle = x - facing * 0.06 * size
    cabin = canvas.trapezoid(
        (middle - 0.25 * size, middle + 0.25 * size, base - 0.72 * size),
        (middle - 0.42 * size, middle + 0.42 * size, base - 0.40 * size),
    )
    paint = _hsv(rng.uniform(), rng.uniform(0.75, 1), rng.uniform(0.75, 1))
    gloss = np.clip(1.15 - (canvas.y - base + 0.42 * size) / size, 0.7, 1.4)
    canvas.paint(body | cabin, paint * gloss[..., None], 'car')
    windows = canvas.trapezoid(
        (middle - 0.21 * size, middle + 0.21 * size, base - 0.67 * size),
        (middle - 0.34 * size, middle + 0.34 * size, base - 0.44 * size),
    )
    windows &= abs(canvas.x - middle) > 0.025 * size
    canvas.paint(windows, _hsv(0.58, 0.3, 0.3) + 0.3 * (gloss[..., None] - 0.9))
    lamp = canvas.ellipse(
        x + facing * 0.55 * size, base - 0.27 * size, 0.06 * size, 0.05 * size
    )
    canvas.paint(lamp, _hsv(0.15, 0.3, 1.0))
    for end in (-0.36, 0.36):
        place = (x + end * size, base - wheel)
        canvas.paint(canvas.ellipse(*place, wheel, wheel), _hsv(0, 0, 0.08), 'car')
        canvas.paint(canvas.ellipse(*place, 0.5 * wheel, 0.5 * wheel), _hsv(0, 0, 0.65))


def _draw_person(canvas: _Canvas, x: float, base: float, size: float) -> None:
    """A standing person: head, hair, striped shirt, legs."""
    rng = canvas.rng
    skin = _hsv(0.07, rng.uniform(0.3, 0.6), rng.uniform(0.4, 0.95))
    shirt = _any_colour(rng)
    trousers = _hsv(rng.uniform(0.5, 0.75), rng.uniform(0.2, 0.6), 0.35)
    hip, shoulder = base - 0.46 * size, base - 0.84 * size
    for end in (-1, 1):
        leg = canvas.trapezoid(
            (
                x + end * 0.08 * size - 0.08 * size,
                x + end * 0.08 * size + 0.08 * size,
                hip,
            ),
            (
                x + end * 0.11 * size - 0.06 * size,
                x + end * 0.11 * size + 0.06 * size,
                base,
            ),
        )
        canvas.paint(leg, _grained(trousers, canvas.noise(0.05, 0.01), 0.1), 'person')
    stripes = ((canvas.y - shoulder) / size % 0.1 < 0.05)[..., None]
    cloth = np.where(stripes, shirt, _hsv(0, 0, 0.95))
    canvas.paint(
        canvas.trapezoid(
            (x - 0.2 * size, x + 0.2 * size, shoulder),
            (x - 0.16 * size, x + 0.16 * size, hip + 0.02 * size),
        ),
        cloth,
        'person',
    )
    for end in (-1, 1):
        reach = rng.uniform(0.2, 0.3) * size
        arm = canvas.trapezoid(
            (
                x + end * 0.2 * size - 0.045 * size,
                x + end * 0.2 * size + 0.045 * size,
                shoulder,
            ),
            (x + end * reach - 0.04 * size, x + end * reach + 0.04 * size, hip),
        )
        canvas.paint(arm, 0.9 * cloth, 'person')
    head = shoulder - 0.1 * size
    hair = _hsv(rng.uniform(0.02, 0.14), 0.5, rng.uniform(0.1, 0.7))
    canvas.paint(canvas.ellipse(x, head, 0.11 * size, 0.13 * size), skin, 'person')
    canvas.paint(
        canvas.ellipse(x, head, 0.11 * size, 0.13 * size)
        & (canvas.y < head - 0.03 * size),
        hair,
    )


def _draw_ball(canvas: _Canvas, x: float, base: float, size: float) -> None:
    """A beach ball: sectors of two colours, shaded like a sphere."""
    rng = canvas.rng
    radius = 0.4 * size
    y = base - radius
    pole = (x + rng.uniform(-0.4, 0.4) * radius, y + rng.uniform(-0.4, 0.4) * radius)
    angle = np.arctan2(canvas.y - pole[1], canvas.x - pole[0]) + rng.uniform(0, 6)
    sectors = (angle / (2 * np.pi) * 8 % 2 < 1)[..., None]
    colour = np.where(sectors, _any_colour(rng, (0.8, 1.0)), _hsv(0, 0, 0.95))
    aside = np.hypot(canvas.x - x + 0.3 * radius, canvas.y - y + 0.4 * radius)
    shade = np.clip(1.15 - 0.35 * aside / radius, 0.5, 1.2)[..., None]
    canvas.paint(canvas.ellipse(x, y, radius, radius), colour * shade, 'ball')


def _draw_boat(canvas: _Canvas, x: float, base: float, size: float) -> None:
    """A sailing boat: hull with a stripe, two sails."""
    rng = canvas.rng
    rail = base - 0.22 * size
    hull = canvas.trapezoid(
        (x - 0.55 * size, x + 0.55 * size, rail),
        (x - 0.36 * size, x + 0.36 * size, base),
    )
    canvas.paint(hull, _any_colour(rng) * 0.6, 'boat')
    stripe = hull & (abs(canvas.y - rail - 0.06 * size) < 0.02 * size)
    canvas.paint(stripe, _hsv(0, 0, 0.95))
    side = rng.choice([-1, 1])
    cloth = _hsv(rng.uniform(), rng.uniform(0, 0.3), rng.uniform(0.85, 1.0))
    top = rail - 0.85 * size
    seams = np.where((canvas.y - top) / size % 0.1 < 0.03, 0.75, 1.0)[..., None]
    for facing, reach, start in ((side, 0.48, top), (-side, 0.34, top + 0.15 * size)):
        foot = sorted((x + facing * 0.02 * size, x + facing * reach * size))
        peak = x + facing * 0.02 * size
        sail = canvas.trapezoid((peak, peak, start), (foot[0], foot[1], rail))
        canvas.paint(sail, cloth * seams * (1.0 if facing == side else 0.85), 'boat')
    mast = canvas.box(x - 0.025 * size, top, x + 0.025 * size, rail)
    canvas.paint(mast, _hsv(0.08, 0.5, 0.35), 'boat')


_Range = tuple[float, float]
_LAND_THINGS: dict[str, tuple[Callable[..., None], _Range, _Range]] = {
    # name: (drawing, range of sizes, how far below the horizon it stands)
    'building': (_draw_building, (0.36, 0.48), (0.04, 0.15)),
    'tree': (_draw_tree, (0.44, 0.56), (0.10, 0.35)),
    'car': (_draw_car, (0.40, 0.52), (0.15, 0.45)),
    'person': (_draw_person, (0.55, 0.70), (0.20, 0.48)),
    'ball': (_draw_ball, (0.45, 0.60), (0.25, 0.48)),
}


def _draw_things(canvas: _Canvas, horizon: float, shore: float | None) -> None:
    """Things side by side, from back to front.

    Args:
        canvas (_Canvas): Holds the land and the sea already.
        horizon (float): Height of the horizon.
        shore (float, optional): Where the sea ends and the land begins; 1 or
            more for sea only, None for land only.
    """
    rng = canvas.rng
    things = []
    land = horizon if shore is None else shore
    if land < 0.9:
        names = list(rng.permutation([n for n in _LAND_THINGS if n != 'building'])[:2])
        if shore is None:  # elsewhere it would hide the boats
            names.append('building')
        slots = rng.permutation(len(names))
        for name, slot in zip(names, slots, strict=True):
            draw, sizes, reach = _LAND_THINGS[name]
            x = (slot + rng.uniform(0.25, 0.75)) / len(names)
            base = min(land + rng.uniform(*reach), 0.98)
            things.append((base, x, rng.uniform(*sizes), draw))
    if shore is not None:
        for side in rng.permutation(2)[: 1 if shore < 1 else 2]:
            base = horizon + rng.uniform(0.10, max(0.12, min(shore, 0.95) - horizon))
            x = 0.5 * side + rng.uniform(0.15, 0.35)
            things.append((base, x, rng.uniform(0.42, 0.54), _draw_boat))
    for base, x, size, draw in sorted(things, key=lambda thing: thing[:3]):
        _draw_shadow(canvas, x, base, size)
        draw(canvas, x, base, size)


def draw_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a small landscape and its semantic segmentation.

    Sky above; mountains at times; grass, sea or both below; and a few things
    of ``ADE_CLASSES`` on them. Colours, light and noise vary enough that shape
    and texture tell the classes, not colour.

    Args:
        rng (np.random.Generator): Source of everything random.
        size (int): Height and width in pixels.

    Returns:
        tuple[np.ndarray, np.ndarray]: The image, (size, size, 3) uint8 RGB,
        and the labels, (size, size) uint8 as in ADE20K's annotation files.
    """
    # Drawn at twice the size and averaged, for smooth edges.
    canvas = _Canvas(2 * size, rng)
    horizon = rng.uniform(0.36, 0.52)
    _draw_sky(canvas)
    if rng.random() < 0.6:
        _draw_mountain(canvas, horizon)
    ground = rng.choice(['land', 'sea', 'both'], p=[0.5, 0.15, 0.35])
    shore = {'land': None, 'sea': 1.0, 'both': horizon + rng.uniform(0.17, 0.27)}[
        ground
    ]
    below = canvas.y >= horizon
    if shore is None:
        _draw_grass(canvas, below)
    else:
        edge = shore + 0.02 * canvas.noise(1.0, 0.15)[:1]
        beach = below & (canvas.y >= edge) & (shore < 1)
        _draw_sea(canvas, below & ~beach, horizon)
        _draw_grass(canvas, beach)
    _draw_things(canvas, horizon, shore)

    image = canvas.image.reshape(size, 2, size, 2, 3).mean((1, 3))
    light = rng.uniform(0.8, 1.1) * (1 + rng.uniform(-0.06, 0.06, 3))
    image = image * light + rng.normal(0, rng.uniform(0.005, 0.02), image.shape)
    image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return image, np.ascontiguousarray(canvas.labels[::2, ::2])


def _write_ade20k(
    root: Path, num_train: int, num_val: int, size: int, seed: int
) -> None:
    """Fill ``root`` like ``ADEChallengeData2016``."""
    from PIL import Image

    counts = (num_train, num_val)
    for place, (split, count) in enumerate(zip(_SPLITS, counts, strict=True)):
        images, annotations = root / 'images' / split, root / 'annotations' / split
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        prefix = f'ADE_{split.removesuffix("ing").removesuffix("idation")}'
        for index in range(1, count + 1):
            # An image depends on its own number only, not on how many there are.
            rng = np.random.default_rng([seed, place, index])
            image, labels = draw_scene(rng, size)
            name = f'{prefix}_{index:08d}'
            Image.fromarray(image).save(
                images / f'{name}.jpg', quality=95, subsampling=0
            )
            Image.fromarray(labels).save(annotations / f'{name}.png')


class _Task(NamedTuple):
    folder: str
    write: Callable[[Path, int, int, int, int], None]


_TASKS = {'ade20k': _Task('ADEChallengeData2016', _write_ade20k)}
TASKS = tuple(_TASKS)


def _check(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f'{name} must be a whole number, got {value!r}')
    if not low <= value <= high:
        raise ValueError(f'{name} must be from {low} to {high}, got {value}')


def make_toy_data(
    task: str = 'ade20k',
    out: str | os.PathLike[str] = 'data/toy',
    num_train: int = 600,
    num_val: int = 24,
    size: int = 112,
    seed: int = 0,
) -> tuple[Path, bool]:
    """Write a toy data set, or reuse it if it is there already.

    It appears all at once: what an interrupted run has written lies in a
    folder ending in ``.partial``, which the next run clears away. The same
    parameters give the same pixels.

    Args:
        task (str): Whose layout and format, one of ``TASKS``.
        out (str or PathLike): Folder that gets the data set's own folder, for
            ``'ade20k'`` this is ``ADEChallengeData2016``.
        num_train (int): Number of training images, 1 to 99,999.
        num_val (int): Number of validation images, 1 to 99,999.
        size (int): Height and width of the images, 64 to 2,048 pixels.
        seed (int): 0 to 2**32 - 1.

    Returns:
        tuple[Path, bool]: The data set's folder, and whether it was drawn now
        (False if it was reused).

    Raises:
        ValueError: If a value is out of its range.
        FileExistsError: If there is a data set that this function did not
            write.
    """
    if task not in _TASKS:
        raise ValueError(f'task must be one of {", ".join(TASKS)}, got {task!r}')
    _check('num_train', num_train, 1, 99_999)
    _check('num_val', num_val, 1, 99_999)
    _check('size', size, 64, 2048)
    _check('seed', seed, 0, 2**32 - 1)

    record = {
        'task': task,
        'version': _VERSION,
        'num_train': num_train,
        'num_val': num_val,
        'size': size,
        'seed': seed,
    }
    root = Path(out) / _TASKS[task].folder
    if root.exists():
        if not (root / _RECORD).is_file():
            raise FileExistsError(
                f'{root} exists and is no toy data set (it has no {_RECORD}): '
                'choose another folder'
            )
        if json.loads((root / _RECORD).read_text()) == record:
            return root, False

    partial = root.with_name(f'{root.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _TASKS[task].write(partial, num_train, num_val, size, seed)
        (partial / _RECORD).write_text(json.dumps(record, indent=2) + '\n')
        if root.exists():
            shutil.rmtree(root)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root, True
