"""A canvas, and the landscapes and things that can be drawn on it."""

from __future__ import annotations

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


class Canvas:
    """An image, its labels and its things, painted over from back to front.

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
        self.instances = np.zeros((side, side), np.uint8)
        # Number of the thing that is being painted; 0 for the background.
        self.current = 0
        centres = (np.arange(side, dtype=np.float32) + 0.5) / side
        self.x, self.y = np.meshgrid(centres, centres)

    def paint(
        self, mask: np.ndarray, colour: np.ndarray, name: str | None = None
    ) -> None:
        """Set the pixels of ``mask``; what they show too if ``name`` is given.

        Args:
            mask (np.ndarray): (side, side), bool.
            colour (np.ndarray): (3,) or (side, side, 3), RGB about [0, 1].
            name (str, optional): A key of ``ADE_CLASSES``.
        """
        self.image[mask] = np.broadcast_to(colour, self.image.shape)[mask]
        if name is not None:
            self.labels[mask] = ADE_CLASSES[name][0]
            self.instances[mask] = self.current

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


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB colour, (3,) float32, from parts in [0, 1]; the hue may overflow."""
    offset = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    chroma = np.clip(np.minimum(offset, 4 - offset), 0, 1)
    return (value * (1 - saturation * chroma)).astype(np.float32)


def any_colour(
    rng: np.random.Generator, saturation: tuple[float, float] = (0.4, 0.9)
) -> np.ndarray:
    """A colour of any hue, neither black nor white."""
    return hsv(rng.uniform(), rng.uniform(*saturation), rng.uniform(0.45, 0.95))


def grained(colour: np.ndarray, grain: np.ndarray, amount: float) -> np.ndarray:
    """(H, W, 3): ``colour`` made lighter and darker by ``grain``, (H, W)."""
    return colour * (1 + amount * grain[..., None])


def develop(canvas: Canvas) -> np.ndarray:
    """The image at half the canvas' side under some light, with noise.

    Args:
        canvas (Canvas): Its side is even; twice that of the image, so that
            averaging makes the edges smooth.

    Returns:
        np.ndarray: (side / 2, side / 2, 3), uint8, RGB.
    """
    rng, size = canvas.rng, canvas.side // 2
    image = canvas.image.reshape(size, 2, size, 2, 3).mean((1, 3))
    light = rng.uniform(0.8, 1.1) * (1 + rng.uniform(-0.06, 0.06, 3))
    image = image * light + rng.normal(0, rng.uniform(0.005, 0.02), image.shape)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def save_jpeg(image: np.ndarray, path: Path) -> None:
    """Write an (H, W, 3) uint8 RGB image, nearly without loss."""
    from PIL import Image

    Image.fromarray(image).save(path, format='JPEG', quality=95, subsampling=0)


def draw_sky(canvas: Canvas) -> None:
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
    sky = (1 - depth) * hsv(*high) + depth * hsv(*low)
    clouds = canvas.noise(0.10, 0.30) + 0.5 * canvas.noise(0.05, 0.15)
    veil = np.clip(0.5 * clouds - rng.uniform(-0.1, 0.5), 0, 0.8)[..., None]
    canvas.paint(canvas.y < 2, sky * (1 - veil) + veil * hsv(0.1, 0.03, 0.97), 'sky')


def draw_mountain(
    canvas: Canvas,
    horizon: float,
    heights: tuple[float, float] = (0.26, 0.36),
    snow: float = 0.3,
) -> None:
    """A ridge with slanted rock faces, snow-capped with a chance of ``snow``."""
    rng = canvas.rng
    height = rng.uniform(*heights)
    ridge = canvas.noise(1.0, rng.uniform(0.2, 0.35))[:1]
    ridge = (ridge - ridge.min()) / np.ptp(ridge)
    top = horizon - height * (0.45 + 0.55 * ridge)
    top = top - 0.008 * canvas.noise(1.0, 0.03)[:1]
    mask = (canvas.y >= top) & (canvas.y < horizon + 0.02)
    rock = hsv(rng.uniform(), rng.uniform(0.05, 0.2), rng.uniform(0.3, 0.5))
    faces = canvas.noise(0.08, 0.025, 0.8) + 0.7 * canvas.noise(0.08, 0.025, -0.8)
    canvas.paint(mask, grained(rock, faces, 0.2), 'mountain')
    if rng.random() < snow:
        cap = mask & (canvas.y < horizon - 0.75 * height - 0.02 * faces)
        canvas.paint(cap, grained(hsv(0.6, 0.05, 0.95), faces, 0.04))


def draw_sea(canvas: Canvas, mask: np.ndarray, horizon: float) -> None:
    """Level waves that grow towards the viewer."""
    rng = canvas.rng
    water = hsv(
        rng.uniform(0.46, 0.66), rng.uniform(0.35, 0.75), rng.uniform(0.45, 0.75)
    )
    near = np.clip((canvas.y - horizon) / (1 - horizon), 0, 1)
    waves = (1 - near) * canvas.noise(0.012, 0.08) + near * canvas.noise(0.025, 0.16)
    canvas.paint(mask, grained(water, waves, 0.17), 'sea')
    glint = mask & (waves > 1.6)
    canvas.paint(glint, 0.4 * water + 0.6)


def draw_grass(canvas: Canvas, mask: np.ndarray) -> None:
    """Upright blades over larger patches, from lush to dry."""
    rng = canvas.rng
    turf = hsv(rng.uniform(0.10, 0.38), rng.uniform(0.35, 0.75), rng.uniform(0.4, 0.7))
    blades = canvas.noise(0.045, 0.010) + 0.5 * canvas.noise(0.15, 0.2)
    canvas.paint(mask, grained(turf, blades, 0.2), 'grass')


def draw_shadow(canvas: Canvas, x: float, y: float, width: float) -> None:
    """Darken the ground below a thing."""
    canvas.image[canvas.ellipse(x, y, 0.6 * width, 0.08 * width)] *= 0.6


def draw_building(canvas: Canvas, x: float, base: float, size: float) -> None:
    """A wall of storeys with rows of windows, flat or gabled."""
    rng = canvas.rng
    width, height = size * rng.uniform(0.7, 1.2), size * rng.uniform(0.8, 1.3)
    left, right, top = x - width / 2, x + width / 2, base - height
    wall = any_colour(rng, (0.1, 0.45))
    courses = np.where((canvas.y - top) % 0.022 < 0.005, 0.85, 1.0)[..., None]
    canvas.paint(
        canvas.box(left, top, right, base),
        grained(wall, canvas.noise(0.01, 0.01), 0.05) * courses,
        'building',
    )
    if rng.random() < 0.5:
        roof = any_colour(rng, (0.3, 0.7)) * 0.7
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
    glass = hsv(0.6, 0.4, 0.25) if rng.random() < 0.6 else hsv(0.13, 0.4, 0.95)
    canvas.paint(panes, grained(glass, canvas.noise(0.03, 0.03), 0.15))


def draw_tree(canvas: Canvas, x: float, base: float, size: float) -> None:
    """A speckled crown on a trunk: round, or pointed like a fir."""
    rng = canvas.rng
    trunk = canvas.box(x - 0.07 * size, base - 0.45 * size, x + 0.07 * size, base)
    bark = hsv(0.07, 0.5, rng.uniform(0.25, 0.45))
    canvas.paint(trunk, grained(bark, canvas.noise(0.1, 0.008), 0.2), 'tree')
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
    leaves = hsv(hue, rng.uniform(0.4, 0.8), rng.uniform(0.3, 0.55))
    light = 1 + 0.6 * ((x - canvas.x) + (base - 0.8 * size - canvas.y)) / size
    speckle = grained(leaves, canvas.noise(0.018, 0.018), 0.35)
    canvas.paint(crown, speckle * light[..., None], 'tree')


def draw_car(canvas: Canvas, x: float, base: float, size: float) -> None:
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
    paint = hsv(rng.uniform(), rng.uniform(0.75, 1), rng.uniform(0.75, 1))
    gloss = np.clip(1.15 - (canvas.y - base + 0.42 * size) / size, 0.7, 1.4)
    canvas.paint(body | cabin, paint * gloss[..., None], 'car')
    windows = canvas.trapezoid(
        (middle - 0.21 * size, middle + 0.21 * size, base - 0.67 * size),
        (middle - 0.34 * size, middle + 0.34 * size, base - 0.44 * size),
    )
    windows &= abs(canvas.x - middle) > 0.025 * size
    canvas.paint(windows, hsv(0.58, 0.3, 0.3) + 0.3 * (gloss[..., None] - 0.9))
    lamp = canvas.ellipse(
        x + facing * 0.55 * size, base - 0.27 * size, 0.06 * size, 0.05 * size
    )
    canvas.paint(lamp, hsv(0.15, 0.3, 1.0))
    for end in (-0.36, 0.36):
        place = (x + end * size, base - wheel)
        canvas.paint(canvas.ellipse(*place, wheel, wheel), hsv(0, 0, 0.08), 'car')
        canvas.paint(canvas.ellipse(*place, 0.5 * wheel, 0.5 * wheel), hsv(0, 0, 0.65))


_Point = tuple[float, float]


class Figure(NamedTuple):
    """Where the parts of a drawn person are, in fractions of the image's side.

    A person faces the viewer. Limbs are given as (upper end, lower end), the
    one on the image's left first, which is the person's own right.

    Attributes:
        head (tuple): Centre of the head's ellipse, (x, y).
        head_axes (tuple): The ellipse's half axes, (x, y).
        arms (tuple): From the shoulders to the finger tips.
        legs (tuple): From the hips to the soles.
        hand (float): Half the width of an arm's lower end.
        foot (float): Half the width of a leg's lower end.
    """

    head: _Point
    head_axes: _Point
    arms: tuple[tuple[_Point, _Point], ...]
    legs: tuple[tuple[_Point, _Point], ...]
    hand: float
    foot: float


def draw_person(canvas: Canvas, x: float, base: float, size: float) -> Figure:
    """A standing person: head, hair, striped shirt, legs."""
    rng = canvas.rng
    skin = hsv(0.07, rng.uniform(0.3, 0.6), rng.uniform(0.4, 0.95))
    shirt = any_colour(rng)
    trousers = hsv(rng.uniform(0.5, 0.75), rng.uniform(0.2, 0.6), 0.35)
    hip, shoulder = base - 0.46 * size, base - 0.84 * size
    arms, legs = [], []
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
        canvas.paint(leg, grained(trousers, canvas.noise(0.05, 0.01), 0.1), 'person')
        legs.append(((x + end * 0.08 * size, hip), (x + end * 0.11 * size, base)))
    stripes = ((canvas.y - shoulder) / size % 0.1 < 0.05)[..., None]
    cloth = np.where(stripes, shirt, hsv(0, 0, 0.95))
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
        arms.append(((x + end * 0.2 * size, shoulder), (x + end * reach, hip)))
    head = shoulder - 0.1 * size
    hair = hsv(rng.uniform(0.02, 0.14), 0.5, rng.uniform(0.1, 0.7))
    canvas.paint(canvas.ellipse(x, head, 0.11 * size, 0.13 * size), skin, 'person')
    canvas.paint(
        canvas.ellipse(x, head, 0.11 * size, 0.13 * size)
        & (canvas.y < head - 0.03 * size),
        hair,
    )
    return Figure(
        head=(x, head),
        head_axes=(0.11 * size, 0.13 * size),
        arms=tuple(arms),
        legs=tuple(legs),
        hand=0.04 * size,
        foot=0.06 * size,
    )


def draw_ball(canvas: Canvas, x: float, base: float, size: float) -> None:
    """A beach ball: sectors of two colours, shaded like a sphere."""
    rng = canvas.rng
    radius = 0.4 * size
    y = base - radius
    pole = (x + rng.uniform(-0.4, 0.4) * radius, y + rng.uniform(-0.4, 0.4) * radius)
    angle = np.arctan2(canvas.y - pole[1], canvas.x - pole[0]) + rng.uniform(0, 6)
    sectors = (angle / (2 * np.pi) * 8 % 2 < 1)[..., None]
    colour = np.where(sectors, any_colour(rng, (0.8, 1.0)), hsv(0, 0, 0.95))
    aside = np.hypot(canvas.x - x + 0.3 * radius, canvas.y - y + 0.4 * radius)
    shade = np.clip(1.15 - 0.35 * aside / radius, 0.5, 1.2)[..., None]
    canvas.paint(canvas.ellipse(x, y, radius, radius), colour * shade, 'ball')


def draw_boat(canvas: Canvas, x: float, base: float, size: float) -> None:
    """A sailing boat: hull with a stripe, two sails."""
    rng = canvas.rng
    rail = base - 0.22 * size
    hull = canvas.trapezoid(
        (x - 0.55 * size, x + 0.55 * size, rail),
        (x - 0.36 * size, x + 0.36 * size, base),
    )
    canvas.paint(hull, any_colour(rng) * 0.6, 'boat')
    stripe = hull & (abs(canvas.y - rail - 0.06 * size) < 0.02 * size)
    canvas.paint(stripe, hsv(0, 0, 0.95))
    side = rng.choice([-1, 1])
    cloth = hsv(rng.uniform(), rng.uniform(0, 0.3), rng.uniform(0.85, 1.0))
    top = rail - 0.85 * size
    seams = np.where((canvas.y - top) / size % 0.1 < 0.03, 0.75, 1.0)[..., None]
    for facing, reach, start in ((side, 0.48, top), (-side, 0.34, top + 0.15 * size)):
        foot = sorted((x + facing * 0.02 * size, x + facing * reach * size))
        peak = x + facing * 0.02 * size
        sail = canvas.trapezoid((peak, peak, start), (foot[0], foot[1], rail))
        canvas.paint(sail, cloth * seams * (1.0 if facing == side else 0.85), 'boat')
    mast = canvas.box(x - 0.025 * size, top, x + 0.025 * size, rail)
    canvas.paint(mast, hsv(0.08, 0.5, 0.35), 'boat')
