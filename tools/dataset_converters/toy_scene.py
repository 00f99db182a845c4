"""Landscapes with a few things, and what each of their pixels shows."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw

#: Name -> (label in the annotation files, colour), both as in ADE20K.
ADE_CLASSES = {
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
WHITE = np.full(3, 0.95, np.float32)
Range = tuple[float, float]
LIGHT = (0.45, 0.95)


class Scene:
    """A square image and what it shows, painted from back to front.

    Points, lengths and the arrays ``x`` and ``y`` are in units of the thing that is
    being drawn: x to the right of its foot, y upwards. Before the first thing they
    are fractions of the image, from its lower left corner. It is painted twice as
    large as asked for, so that edges become smooth.

    Attributes:
        image (np.ndarray): RGB about [0, 1]; (size, size, 3) uint8 in the end.
        labels (np.ndarray): As in ADE20K's annotations, uint8.
        instances (np.ndarray): The number of the thing that a pixel shows, uint8, from
            1 at the back; 0 for the background.
        things (list): Of each thing the name in ``ADE_CLASSES``, and the keypoints
            if it is a person, as fractions from the image's upper left corner.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.side = 2 * size
        self.rng = rng
        self.image = np.zeros((self.side, self.side, 3), np.float32)
        self.labels = np.zeros((self.side, self.side), np.uint8)
        self.instances = np.zeros_like(self.labels)
        self.things = []
        self._measure(0, 0, 1)

    def _measure(self, x: float, base: float, unit: float) -> None:
        centres = (np.arange(self.side, dtype=np.float32) + 0.5) / self.side
        self.foot, self.unit = np.array([x, base]), unit
        self.x, self.y = np.meshgrid((centres - x) / unit, (1 - base - centres) / unit)

    def add(self, name: str, x: float, base: float, unit: float) -> None:
        """Draw a thing with its shadow: its foot and size as fractions of the image."""
        self._measure(x, base, unit)
        self.image[self.ellipse(0, 0, 0.6, 0.08)] *= 0.6
        self.things.append((name, None))
        points = THINGS[name][0](self)
        self.things[-1] = name, points

    def locate(self, points: np.ndarray) -> np.ndarray:
        """Points of the thing, (K, 2), as fractions from the upper left corner."""
        return (self.foot + self.unit * np.asarray(points)) * (1, -1) + (0, 1)

    def polygon(self, *corners: tuple[float, float]) -> np.ndarray:
        """Mask of a polygon."""
        mask = Image.new('1', (self.side, self.side))
        pixels = self.locate(corners) * self.side - 0.5
        ImageDraw.Draw(mask).polygon([*map(tuple, pixels.tolist())], fill=1)
        return np.array(mask)

    def box(self, left: float, bottom: float, right: float, top: float) -> np.ndarray:
        """Mask of an upright rectangle."""
        return self.polygon((left, bottom), (left, top), (right, top), (right, bottom))

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> np.ndarray:
        """Mask of an ellipse given by its centre and half axes."""
        return ((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2 <= 1

    def limb(self, start: np.ndarray, end: np.ndarray, width: float) -> np.ndarray:
        """Mask of a thick line with round ends."""
        (x, y), (across, up) = start, np.subtract(end, start)
        along = (self.x - x) * across + (self.y - y) * up
        along = np.clip(along / (across**2 + up**2), 0, 1)
        aside = np.hypot(self.x - x - along * across, self.y - y - along * up)
        return aside <= width / 2

    def noise(self, height: float, width: float, slant: float = 0.0) -> np.ndarray:
        """Smooth noise of zero mean and unit deviation, (side, side).

        A grain's height and width are fractions of the image; it leans by ``slant``
        images for each that it is high.
        """
        cells = int(1 / height) + 3, int(1 / width) + 3
        grid = Image.fromarray(self.rng.standard_normal(cells).astype(np.float32))
        field = np.array(grid.resize((self.side, self.side), Image.Resampling.BICUBIC))
        if slant:
            field = np.stack([np.roll(r, int(slant * i)) for i, r in enumerate(field)])
        return (field - np.mean(field)) / np.std(field)

    def colour(
        self, hue: Range = (0, 1), saturation: Range = (0.4, 0.9), value: Range = LIGHT
    ) -> np.ndarray:
        """A random RGB colour, (3,), from ranges in [0, 1]; the hue may overflow."""
        return hsv(*map(self.rng.uniform, *zip(hue, saturation, value)))

    def paint(
        self, mask: np.ndarray, colour: np.ndarray, name: str | None = None
    ) -> None:
        """Set pixels to RGB of one or all of them; if named, what they show too."""
        np.copyto(self.image, colour, casting='same_kind', where=mask[..., None])
        if name is not None:
            self.labels[mask] = ADE_CLASSES[name][0]
            self.instances[mask] = len(self.things)

    def develop(self) -> None:
        """Halve the size; put the image into some light, with a camera's noise."""
        size, rng = self.side // 2, self.rng
        image = self.image.reshape(size, 2, size, 2, 3).mean((1, 3))
        light = rng.uniform(0.8, 1.1) * rng.uniform(0.94, 1.06, 3)
        image = rng.normal(image * light, rng.uniform(0.005, 0.02))
        self.image = (image.clip(0, 1) * 255).round().astype(np.uint8)
        self.labels, self.instances = self.labels[::2, ::2], self.instances[::2, ::2]


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """An RGB colour, (3,); the hue may overflow."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def grained(colour: np.ndarray, grain: np.ndarray, amount: float) -> np.ndarray:
    """A colour made lighter and darker by a grain, (side, side)."""
    return colour * (1 + amount * grain[..., None])


def stripes(along: np.ndarray, period: float) -> np.ndarray:
    """Where there is a stripe, (side, side, 1) bool: half of each period."""
    return (along % period < period / 2)[..., None]


def draw_sky(scene: Scene) -> None:
    """From blue to what the weather is at the horizon, with soft clouds."""
    depth = (1.8 - 1.8 * scene.y).clip(0, 1)[..., None]
    high = scene.colour((0.5, 0.66), (0.1, 0.65), (0.6, 0.85))
    low = scene.colour((0.07, 0.55), (0.05, 0.35), (0.85, 0.95))
    clouds = scene.noise(0.10, 0.30) + 0.5 * scene.noise(0.05, 0.15)
    veil = (0.5 * clouds - scene.rng.uniform(-0.1, 0.5)).clip(0, 0.8)[..., None]
    sky = (1 - depth) * high + depth * low
    scene.paint(scene.y < 2, (1 - veil) * sky + veil * WHITE, 'sky')


def draw_mountain(scene: Scene, horizon: float) -> None:
    """A ridge with slanted rock faces, at times snow-capped."""
    height = scene.rng.uniform(0.26, 0.36)
    ridge = scene.noise(1.0, scene.rng.uniform(0.2, 0.35))[:1]
    ridge = 0.45 + 0.55 * (ridge - ridge.min()) / np.ptp(ridge)
    ridge = horizon + height * ridge + 0.008 * scene.noise(1.0, 0.03)[:1]
    mask = (scene.y < ridge) & (scene.y > horizon - 0.02)
    left, right = scene.noise(0.08, 0.025, 0.8), scene.noise(0.08, 0.025, 0.8)
    faces = left + 0.7 * right[:, ::-1]
    rock = scene.colour((0, 1), (0.05, 0.2), (0.3, 0.5))
    scene.paint(mask, grained(rock, faces, 0.2), 'mountain')
    if scene.rng.random() < 0.3:
        cap = mask & (scene.y > horizon + 0.75 * height + 0.02 * faces)
        scene.paint(cap, grained(WHITE, faces, 0.04))


def draw_sea(scene: Scene, mask: np.ndarray, horizon: float) -> None:
    """Level waves that grow towards the viewer."""
    water = scene.colour((0.46, 0.66), (0.35, 0.75), (0.45, 0.75))
    far = (scene.y / horizon).clip(0, 1)
    waves = far * scene.noise(0.012, 0.08) + (1 - far) * scene.noise(0.025, 0.16)
    scene.paint(mask, grained(water, waves, 0.17), 'sea')
    scene.paint(mask & (waves > 1.6), 0.4 * water + 0.6)


def draw_grass(scene: Scene, mask: np.ndarray) -> None:
    """Upright blades over larger patches, from lush to dry."""
    turf = scene.colour((0.10, 0.38), (0.35, 0.75), (0.4, 0.7))
    blades = scene.noise(0.045, 0.010) + 0.5 * scene.noise(0.15, 0.2)
    scene.paint(mask, grained(turf, blades, 0.2), 'grass')


def draw_building(scene: Scene) -> None:
    """A gabled house with rows of windows."""
    half, height = scene.rng.uniform((0.35, 0.8), (0.6, 1.3))
    wall = scene.box(-half, 0, half, height)
    bricks = scene.colour(saturation=(0.1, 0.45))
    scene.paint(wall, bricks * (1 - 0.1 * stripes(scene.y, 0.05)), 'building')
    eaves = half + 0.04
    roof = scene.polygon((-eaves, height), (eaves, height), (0, height + 0.6 * half))
    tiles = 0.6 * scene.colour() * (1 - 0.2 * stripes(scene.y, 0.07))
    scene.paint(roof, tiles, 'building')
    columns, rows = scene.rng.integers(3, 6, 2)
    across = (scene.x / half + 1) / 2 * columns % 1
    up = scene.y / height * rows % 1
    panes = wall & (abs(across - 0.5) < 0.27) & (abs(up - 0.5) < 0.3)
    scene.paint(panes, scene.colour((0.1, 0.6), (0.4, 0.4), (0.2, 0.9)))


def draw_tree(scene: Scene) -> None:
    """A speckled crown on a trunk."""
    bark = scene.colour((0.07, 0.07), (0.5, 0.5), (0.25, 0.45))
    trunk = scene.box(-0.07, 0, 0.07, 0.45)
    scene.paint(trunk, grained(bark, scene.noise(0.1, 0.008), 0.2), 'tree')
    crown = [
        scene.ellipse(x, 0.8 + y, *scene.rng.uniform(0.21, 0.28, 2))
        for x, y in _arc(0, 0, 0.2, 0.2, 8)
    ]
    hue = (0.18, 0.42) if scene.rng.random() < 0.65 else (-0.1, 0.15)
    leaves = scene.colour(hue, (0.4, 0.8), (0.3, 0.55))
    light = 1 + 0.6 * (scene.y - 0.8 - scene.x)
    speckle = grained(leaves, scene.noise(0.018, 0.018), 0.35)
    scene.paint(np.any(crown, 0), speckle * light[..., None], 'tree')


def draw_car(scene: Scene) -> None:
    """A car from the side."""
    gloss = (0.73 + scene.y).clip(0.7, 1.4)[..., None]
    paint = scene.colour((0, 1), (0.75, 1), (0.75, 1)) * gloss
    cabin = scene.polygon((-0.46, 0.4), (-0.3, 0.72), (0.2, 0.72), (0.36, 0.4))
    scene.paint(cabin, paint, 'car')
    scene.paint(scene.limb((-0.46, 0.25), (0.46, 0.25), 0.34), paint, 'car')
    glass = scene.polygon((-0.38, 0.44), (-0.26, 0.67), (0.16, 0.67), (0.28, 0.44))
    scene.paint(glass & (abs(scene.x + 0.05) > 0.025), hsv(0.58, 0.3, 0.3) * gloss)
    scene.paint(scene.ellipse(0.56, 0.27, 0.06, 0.05), hsv(0.15, 0.3, 1))
    for x in (-0.36, 0.36):
        scene.paint(scene.ellipse(x, 0.15, 0.15, 0.15), hsv(0, 0, 0.08), 'car')
        scene.paint(scene.ellipse(x, 0.15, 0.075, 0.075), hsv(0, 0, 0.65))


def draw_boat(scene: Scene) -> None:
    """A sailing boat: a hull with a stripe, two sails."""
    cloth = scene.colour((0, 1), (0, 0.3), (0.85, 1))
    cloth = cloth * (1 - 0.25 * stripes(scene.y, 0.1))
    for reach, top, light in ((0.48, 1.07, 1), (-0.34, 0.92, 0.85)):
        sail = scene.polygon((0, top), (0, 0.22), (reach, 0.22))
        scene.paint(sail, cloth * light, 'boat')
    scene.paint(scene.box(-0.025, 0.22, 0.025, 1.07), hsv(0.08, 0.5, 0.35), 'boat')
    hull = scene.polygon((-0.36, 0), (-0.55, 0.22), (0.55, 0.22), (0.36, 0))
    scene.paint(hull, 0.6 * scene.colour(), 'boat')
    scene.paint(hull & (abs(scene.y - 0.16) < 0.02), WHITE)


def draw_ball(scene: Scene) -> None:
    """A beach ball: sectors of two colours, shaded like a sphere."""
    x, y = scene.rng.uniform(-0.15, 0.15, 2) + (0, 0.4)
    angle = np.arctan2(scene.y - y, scene.x - x) + scene.rng.uniform(0, 6)
    sectors = stripes(angle, np.pi / 2)
    colour = np.where(sectors, scene.colour(saturation=(0.8, 1)), WHITE)
    shade = 1.15 - 0.9 * np.hypot(scene.x + 0.12, scene.y - 0.56)
    ball = scene.ellipse(0, 0.4, 0.4, 0.4)
    scene.paint(ball, colour * shade.clip(0.5, 1.2)[..., None], 'ball')


def _arc(
    x: float, y: float, rx: float, ry: float, count: int, part: float = 1
) -> np.ndarray:
    """Points of an ellipse from its left end on, (count, 2), over the top if ry > 0."""
    angle = np.linspace(0, 2 * np.pi * part, count, endpoint=part < 1)
    return np.stack((x - rx * np.cos(angle), y + ry * np.sin(angle)), 1)


# In half axes of the head: jaw, brows, nose, eyes, lips, in the order of iBUG 300-W.
_FACE = np.concatenate([
    _arc(0, 0.1, 0.92, -1.02, 17, 0.5),
    *(_arc(x, 0.16, 0.25, 0.05, 5, 0.5) for x in (-0.43, 0.43)),
    [(0, 0), (0, -0.1), (0, -0.2), (0, -0.3)],
    _arc(0, -0.36, 0.16, -0.05, 5, 0.5),
    *(_arc(x, 0, 0.16, 0.1, 6) for x in (-0.42, 0.42)),
    _arc(0, -0.65, 0.34, 0.13, 12),
    _arc(0, -0.65, 0.24, 0.05, 8),
])  # fmt: skip
# The root of a hand, then four points of each finger from the thumb on: along the
# forearm and across it, towards the thumb.
_TIPS = [(0.05, 0.04), (0.09, 0.025), (0.1, 0), (0.09, -0.02), (0.07, -0.035)]
_HAND = np.concatenate([[(0, 0)], *(np.outer((0.4, 0.6, 0.8, 1), t) for t in _TIPS)])


def pose(arms: np.ndarray) -> dict[str, np.ndarray]:
    """Keypoints (K, 2) of a person who faces the viewer, by COCO-WholeBody's keys.

    ``arms`` (2, 2) has the angles of upper arm and forearm on the person's left and
    right: 0 hanging, pi / 2 level outwards.
    """
    # The person's left is on the image's right.
    side = np.array([[1], [-1]])

    def pair(x: float, y: float) -> np.ndarray:
        return np.array([(x, y), (-x, y)])

    along = np.stack((side * np.sin(arms), -np.cos(arms)), -1)
    shoulders = pair(0.17, 0.79)
    elbows = shoulders + 0.19 * along[:, 0]
    wrists = elbows + 0.16 * along[:, 1]
    # Palms to the thighs: the thumb is on the inner side of an arm that hangs.
    across = along[:, 1, ::-1] * side * (1, -1)
    hands = wrists[:, None] + _HAND @ np.stack((along[:, 1], across), 1)
    face = _FACE * (0.11, 0.13) + (0, 0.94)
    eyes = face[42:48].mean(0), face[36:42].mean(0)
    legs = pair(0.08, 0.46), pair(0.095, 0.25), pair(0.105, 0.06)
    feet = [pair(0.08, 0.015), pair(0.16, 0.015), pair(0.11, 0.035)]
    return {
        'keypoints': np.concatenate(
            [face[[30]], eyes, face[[16, 0]], shoulders, elbows, wrists, *legs]
        ),
        'foot_kpts': np.stack(feet, 1).reshape(6, 2),
        'face_kpts': face,
        'lefthand_kpts': hands[0],
        'righthand_kpts': hands[1],
    }


def draw_person(scene: Scene) -> dict[str, np.ndarray]:
    """A person in some pose; returns its keypoints as fractions of the image."""
    points = pose(scene.rng.uniform(0.1, (0.8, 1.2), (2, 2)))
    body, face = points['keypoints'], points['face_kpts']
    skin = scene.colour((0.07, 0.07), (0.3, 0.6), (0.4, 0.95))
    cloth = np.where(stripes(scene.y, 0.1), scene.colour(), WHITE)
    trousers = scene.colour((0.5, 0.75), (0.2, 0.6), (0.3, 0.4))
    trousers = grained(trousers, scene.noise(0.05, 0.01), 0.1)

    def limb(*shape: np.ndarray | float, colour: np.ndarray) -> None:
        scene.paint(scene.limb(*shape), colour, 'person')

    for _, toe, heel in points['foot_kpts'].reshape(2, 3, 2):
        limb(toe, heel * (0.7, 0.8), 0.06, colour=hsv(0, 0, 0.2))
    for side in (0, 1):
        shoulder, elbow, wrist, hip, knee, ankle = body[5 + side :: 2]
        limb(hip, knee, 0.15, colour=trousers)
        limb(knee, ankle, 0.12, colour=trousers)
    for side, hand in enumerate((points['lefthand_kpts'], points['righthand_kpts'])):
        shoulder, elbow, wrist = body[5 + side : 11 : 2]
        limb(elbow, wrist, 0.07, colour=skin)
        for tip in hand[4::4]:
            limb(hand[0], tip, 0.03, colour=skin)
        limb(shoulder, elbow, 0.1, colour=cloth)
    torso = body[[5, 6, 12, 11]] + [(0.03, 0.05), (-0.03, 0.05), (-0.07, 0), (0.07, 0)]
    scene.paint(scene.polygon(*torso), cloth, 'person')
    head = scene.ellipse(0, 0.94, 0.11, 0.13)
    scene.paint(head, skin, 'person')
    hair = scene.colour((0.02, 0.14), (0.5, 0.5), (0.1, 0.7))
    scene.paint(head & (scene.y > 0.98), hair)
    for start, end, hue in ((36, 42, 0.6), (42, 48, 0.6), (48, 60, 0)):
        scene.paint(scene.polygon(*face[start:end]), hsv(hue, 0.8, 0.4))
    return {part: scene.locate(places) for part, places in points.items()}


#: Name -> how it is drawn, its sizes, how far it stands below the horizon or shore.
THINGS = {
    'building': (draw_building, (0.36, 0.48), (0.04, 0.15)),
    'tree': (draw_tree, (0.44, 0.56), (0.10, 0.35)),
    'car': (draw_car, (0.40, 0.52), (0.15, 0.45)),
    'person': (draw_person, (0.55, 0.70), (0.20, 0.48)),
    'ball': (draw_ball, (0.45, 0.60), (0.25, 0.48)),
    'boat': (draw_boat, (0.42, 0.54), (0.10, 0.16)),
}


def draw_scene(rng: np.random.Generator, size: int, only: str | None = None) -> Scene:
    """Draw sky, at times mountains, grass or sea or both, and a few things or one.

    Colours, light and noise vary so much that shape and texture tell the classes, not
    colour.
    """
    scene = Scene(size, rng)
    horizon = shore = rng.uniform(0.48, 0.64)
    draw_sky(scene)
    if rng.random() < 0.6:
        draw_mountain(scene, horizon)
    ground = rng.choice(['land', 'sea', 'both'], p=[0.5, 0.15, 0.35])
    things = [*rng.permutation(['tree', 'car', 'person', 'ball'])[:2]]
    if only is not None:
        ground, things = ('sea' if only == 'boat' else 'land'), [only]
    elif ground == 'sea':
        things = ['boat', 'boat']
    else:
        things.append('building' if ground == 'land' else 'boat')
    if ground != 'land':
        draw_sea(scene, scene.y < horizon, horizon)
    if ground == 'both':
        shore -= rng.uniform(0.17, 0.27)
    if ground != 'sea':
        draw_grass(scene, scene.y < shore + 0.01 * scene.noise(1.0, 0.15)[:1])

    places = []
    for slot, name in zip(rng.permutation(len(things)), things):
        _, sizes, below = THINGS[name]
        line = horizon if name == 'boat' else shore
        base = max(0.02, line - rng.uniform(*below))
        x = (slot + rng.uniform(0.25, 0.75)) / len(things)
        places.append((base, x, rng.uniform(*sizes), name))
    for base, x, unit, name in sorted(places, reverse=True):
        scene.add(name, x, base, unit)
    scene.develop()
    return scene
