"""Toy data in the layout and format of ImageNet-1k."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .drawing import (
    Canvas,
    any_colour,
    develop,
    draw_boat,
    draw_car,
    draw_grass,
    draw_mountain,
    draw_sea,
    draw_shadow,
    draw_sky,
    grained,
    hsv,
    save_jpeg,
)


def _draw_alp(canvas: Canvas, x: float, base: float, size: float) -> None:
    """A range over the image's whole width, mostly with snow, behind a meadow."""
    draw_mountain(canvas, base, (0.8 * size, size), snow=0.9)
    draw_grass(canvas, canvas.y >= base)


def _draw_barn(canvas: Canvas, x: float, base: float, size: float) -> None:
    """A boarded wall and gambrel gable, with a large door braced by a cross."""
    rng = canvas.rng
    half, eaves = 0.55 * size, base - 0.5 * size
    knee, ridge = eaves - 0.28 * size, eaves - 0.42 * size
    planks = np.where((canvas.x - x) / size % 0.06 < 0.012, 0.75, 1.0)[..., None]
    boards = grained(any_colour(rng, (0.4, 0.8)), canvas.noise(0.2, 0.008), 0.08)
    wall = canvas.box(x - half, eaves, x + half, base)
    upper = canvas.trapezoid(
        (x - 0.35 * size, x + 0.35 * size, knee), (x - half, x + half, eaves)
    ) | canvas.trapezoid(
        (x - 0.02 * size, x + 0.02 * size, ridge),
        (x - 0.35 * size, x + 0.35 * size, knee),
    )
    canvas.paint(wall | upper, boards * planks, 'building')
    # What the gable, moved down, leaves of itself is the edge of the roof.
    edge = 0.05 * size
    lower = np.roll(upper, int(edge * canvas.side), axis=0)
    canvas.paint(upper & ~lower, hsv(0.6, 0.1, rng.uniform(0.25, 0.6)))
    white = hsv(0, 0, 0.93)
    width, top = 0.22 * size, base - 0.4 * size
    door = canvas.box(x - width, top, x + width, base)
    across = abs(canvas.x - x) / width
    down = (canvas.y - top) / (base - top)
    brace = abs(abs(2 * down - 1) - across) < 0.12
    frame = (across > 0.88) | (down < 0.07) | (across < 0.05)
    canvas.paint(door & (brace | frame), white)
    loft = canvas.box(
        x - 0.09 * size, knee + 0.05 * size, x + 0.09 * size, knee + 0.2 * size
    )
    canvas.paint(loft, hsv(0.08, 0.4, 0.15))


def _draw_catamaran(canvas: Canvas, x: float, base: float, size: float) -> None:
    """A sailing boat with a second hull beside the first."""
    draw_boat(canvas, x, base - 0.1 * size, size)
    rng = canvas.rng
    colour = any_colour(rng)
    for slant in (-0.3, 0.3):
        beam = canvas.box(
            x + (slant - 0.04) * size,
            base - 0.3 * size,
            x + (slant + 0.04) * size,
            base - 0.1 * size,
        )
        canvas.paint(beam, hsv(0, 0, 0.75), 'boat')
    hull = canvas.trapezoid(
        (x - 0.6 * size, x + 0.5 * size, base - 0.13 * size),
        (x - 0.45 * size, x + 0.4 * size, base),
    )
    canvas.paint(hull, colour * 0.8, 'boat')


def _draw_soccer_ball(canvas: Canvas, x: float, base: float, size: float) -> None:
    """A white ball with dark pentagons, turned at random and shaded."""
    rng = canvas.rng
    radius = 0.45 * size
    across, down = (canvas.x - x) / radius, (canvas.y - base + radius) / radius
    ball = np.hypot(across, down) <= 1
    height = np.sqrt(np.clip(1 - across**2 - down**2, 0, None))
    surface = np.stack((across, down, height), -1)
    # The pentagons of a football sit round the corners of an icosahedron.
    golden = (1 + 5**0.5) / 2
    corners = [(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    corners = np.concatenate([np.roll(corners, turn, 1) for turn in range(3)])
    corners /= np.linalg.norm(corners[0])
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    near = np.sort(surface @ (corners @ turn).T, axis=-1)
    patch = near[..., -1] > 0.93
    # Seams run where two pentagons are equally far.
    seam = near[..., -1] - near[..., -2] < 0.03
    white = hsv(0.1, 0.03, rng.uniform(0.85, 1.0))
    dark = any_colour(rng) * rng.uniform(0.1, 0.4)
    colour = np.where(seam[..., None], 0.6 * white, white)
    colour = np.where(patch[..., None], dark, colour)
    light = np.clip(0.75 + 0.35 * (surface @ (-0.4, -0.5, 0.7)), 0.4, 1.2)
    canvas.paint(ball, colour * light[..., None], 'ball')


class ImageNetClass(NamedTuple):
    """A class of ImageNet-1k and how it is drawn.

    Attributes:
        name (str): First of its names.
        index (int): 0 to 999, in the order of the folders' names.
        draw (Callable): Gets canvas, x, base and size.
        sizes (tuple): Smallest and largest size.
        at_sea (bool): Whether it stands in the sea and not on grass.
        horizons (tuple): Highest and lowest horizon.
    """

    name: str
    index: int
    draw: Callable[[Canvas, float, float, float], None]
    sizes: tuple[float, float]
    at_sea: bool = False
    horizons: tuple[float, float] = (0.4, 0.6)


# By the folder's name, which is the class' number in WordNet.
IMAGENET_CLASSES: dict[str, ImageNetClass] = {
    # The horizon is low enough for the lowest ridge to hide it.
    'n09193705': ImageNetClass(
        'alp', 970, _draw_alp, (0.6, 0.8), horizons=(0.78, 0.82)
    ),
    'n02793495': ImageNetClass('barn', 425, _draw_barn, (0.6, 0.75)),
    'n02981792': ImageNetClass('catamaran', 484, _draw_catamaran, (0.58, 0.68), True),
    'n04254680': ImageNetClass('soccer ball', 805, _draw_soccer_ball, (0.6, 0.85)),
    'n04285008': ImageNetClass('sports car', 817, draw_car, (0.62, 0.75)),
}


def draw_object(rng: np.random.Generator, size: int, wnid: str) -> np.ndarray:
    """Draw one large thing under the sky, on grass or at sea.

    Args:
        rng (np.random.Generator): Source of everything random.
        size (int): Height and width in pixels.
        wnid (str): A key of ``IMAGENET_CLASSES``.

    Returns:
        np.ndarray: (size, size, 3), uint8, RGB.
    """
    kind = IMAGENET_CLASSES[wnid]
    canvas = Canvas(2 * size, rng)
    horizon = rng.uniform(*kind.horizons)
    draw_sky(canvas)
    ground = canvas.y >= horizon
    if kind.at_sea:
        draw_sea(canvas, ground, horizon)
    else:
        draw_grass(canvas, ground)
    place = rng.uniform(0.4, 0.6), rng.uniform(0.82, 0.93), rng.uniform(*kind.sizes)
    draw_shadow(canvas, *place)
    kind.draw(canvas, *place)
    return develop(canvas)


def write(root: Path, num_train: int, num_val: int, size: int, seed: int) -> None:
    """Fill ``root`` like ``data/imagenet`` of MMPretrain.

    The classes take turns, so their numbers of images differ by one at most.

    Args:
        root (Path): An empty folder.
        num_train (int): Number of training images.
        num_val (int): Number of validation images.
        size (int): Height and width of the images in pixels.
        seed (int): Decides what is drawn.
    """
    (root / 'meta').mkdir()
    wnids = tuple(IMAGENET_CLASSES)
    for place, (split, count) in enumerate((('train', num_train), ('val', num_val))):
        lines = []
        for index in range(count):
            turn, kind = divmod(index, len(wnids))
            wnid = wnids[kind]
            if split == 'train':
                name = f'{wnid}/{wnid}_{turn + 1}.JPEG'
            else:
                name = f'{wnid}/ILSVRC2012_val_{index + 1:08d}.JPEG'
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # An image depends on its own number only, not on how many there are.
            rng = np.random.default_rng([seed, place, index + 1])
            save_jpeg(draw_object(rng, size, wnid), path)
            lines.append(f'{name} {IMAGENET_CLASSES[wnid].index}\n')
        # In the order of the folders, so that a set that grows keeps its lines.
        (root / 'meta' / f'{split}.txt').write_text(''.join(sorted(lines)))
