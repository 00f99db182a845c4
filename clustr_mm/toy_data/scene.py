"""Landscapes with a few things, and what each of their pixels shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .drawing import (
    Canvas,
    Figure,
    develop,
    draw_ball,
    draw_boat,
    draw_building,
    draw_car,
    draw_grass,
    draw_mountain,
    draw_person,
    draw_sea,
    draw_shadow,
    draw_sky,
    draw_tree,
)


class Thing(NamedTuple):
    """A thing of a scene: its name in ``ADE_CLASSES``, a person's figure too."""

    name: str
    figure: Figure | None


class Scene(NamedTuple):
    """A drawn image and what it shows.

    Attributes:
        image (np.ndarray): (size, size, 3), uint8, RGB.
        labels (np.ndarray): (size, size), uint8, as in ADE20K's annotations.
        instances (np.ndarray): (size, size), uint8, which thing a pixel
            shows, counted from 1 at the back; 0 for the background.
        things (list[Thing]): The things by their numbers, so the first one
            has number 1. Those in front may hide some of them altogether.
    """

    image: np.ndarray
    labels: np.ndarray
    instances: np.ndarray
    things: list[Thing]


_Range = tuple[float, float]
_LAND_THINGS: dict[str, tuple[Callable[..., Figure | None], _Range, _Range]] = {
    # name: (drawing, range of sizes, how far below the horizon it stands)
    'building': (draw_building, (0.36, 0.48), (0.04, 0.15)),
    'tree': (draw_tree, (0.44, 0.56), (0.10, 0.35)),
    'car': (draw_car, (0.40, 0.52), (0.15, 0.45)),
    'person': (draw_person, (0.55, 0.70), (0.20, 0.48)),
    'ball': (draw_ball, (0.45, 0.60), (0.25, 0.48)),
}


def _draw_things(canvas: Canvas, horizon: float, shore: float | None) -> list[Thing]:
    """Things side by side, from back to front.

    Args:
        canvas (Canvas): Holds the land and the sea already.
        horizon (float): Height of the horizon.
        shore (float, optional): Where the sea ends and the land begins; 1 or
            more for sea only, None for land only.

    Returns:
        list[Thing]: The things from back to front.
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
            things.append((base, x, rng.uniform(*sizes), str(name), draw))
    if shore is not None:
        for side in rng.permutation(2)[: 1 if shore < 1 else 2]:
            base = horizon + rng.uniform(0.10, max(0.12, min(shore, 0.95) - horizon))
            x = 0.5 * side + rng.uniform(0.15, 0.35)
            things.append((base, x, rng.uniform(0.42, 0.54), 'boat', draw_boat))
    drawn = []
    for base, x, size, name, draw in sorted(things, key=lambda thing: thing[:3]):
        draw_shadow(canvas, x, base, size)
        canvas.current = len(drawn) + 1
        drawn.append(Thing(name, draw(canvas, x, base, size)))
    return drawn


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draw a small landscape with a few things.

    Sky above; mountains at times; grass, sea or both below; and a few things
    of ``ADE_CLASSES`` on them. Colours, light and noise vary enough that shape
    and texture tell the classes, not colour.

    Args:
        rng (np.random.Generator): Source of everything random.
        size (int): Height and width in pixels.

    Returns:
        Scene: The image, the labels of its pixels and its things.
    """
    canvas = Canvas(2 * size, rng)
    horizon = rng.uniform(0.36, 0.52)
    draw_sky(canvas)
    if rng.random() < 0.6:
        draw_mountain(canvas, horizon)
    ground = rng.choice(['land', 'sea', 'both'], p=[0.5, 0.15, 0.35])
    shore = {'land': None, 'sea': 1.0, 'both': horizon + rng.uniform(0.17, 0.27)}[
        ground
    ]
    below = canvas.y >= horizon
    if shore is None:
        draw_grass(canvas, below)
    else:
        edge = shore + 0.02 * canvas.noise(1.0, 0.15)[:1]
        beach = below & (canvas.y >= edge) & (shore < 1)
        draw_sea(canvas, below & ~beach, horizon)
        draw_grass(canvas, beach)
    things = _draw_things(canvas, horizon, shore)
    return Scene(
        develop(canvas),
        np.ascontiguousarray(canvas.labels[::2, ::2]),
        np.ascontiguousarray(canvas.instances[::2, ::2]),
        things,
    )
