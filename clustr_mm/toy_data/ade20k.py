"""Toy data in the layout and format of ADE20K."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .drawing import save_jpeg
from .scene import draw_scene

_SPLITS = ('training', 'validation')


def write(root: Path, num_train: int, num_val: int, size: int, seed: int) -> None:
    """Fill ``root`` like ``ADEChallengeData2016``.

    Args:
        root (Path): An empty folder.
        num_train (int): Number of training images.
        num_val (int): Number of validation images.
        size (int): Height and width of the images in pixels.
        seed (int): Decides what is drawn.
    """
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
            scene = draw_scene(rng, size)
            name = f'{prefix}_{index:08d}'
            save_jpeg(scene.image, images / f'{name}.jpg')
            Image.fromarray(scene.labels).save(annotations / f'{name}.png')
