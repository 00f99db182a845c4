"""Pictures of the cue task, drawn on the fly."""

from functools import lru_cache
from typing import Any

import numpy as np
import skimage
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

#: Those that scikit-image brings along; no photograph is in both splits.
PHOTOGRAPHS = dict(
    train=('astronaut', 'coffee', 'rocket', 'gravel', 'immunohistochemistry'),
    val=('chelsea', 'grass', 'hubble_deep_field'),
)

#: Colours of the shapes, RGB, and how far a channel of a pixel may be off.
COLOURS = np.array(
    [
        *([220, 40, 40], [40, 190, 60], [50, 80, 230]),
        *([220, 200, 40], [210, 50, 210], [40, 190, 210]),
    ]
)
NOISE = 40

#: What is left of the brightness of a photograph: no pixel of it is as bright as the
#: brightest channel of a colour.
DARKNESS = 0.4

BACKGROUND, TARGET, OTHER = range(3)

#: Times that a picture is begun anew before it is said to have no room.
ATTEMPTS = 200


@lru_cache
def photographs(split: str) -> list[np.ndarray]:
    """The darkened photographs (H, W, 3) uint8 of a split."""
    images = [np.atleast_3d(getattr(skimage.data, n)()) for n in PHOTOGRAPHS[split]]
    return [
        np.broadcast_to(image * DARKNESS, (*image.shape[:2], 3)).astype(np.uint8)
        for image in images
    ]


@DATASETS.register_module()
class CueTask(BaseSegDataset):
    """Shapes in several colours, and a cue that says which colour is the target.

    A picture is a piece of a darkened photograph with squares and discs in strong,
    noisy colours, and one cue: a square patch of one colour with a white rim. Shapes
    of the cue's colour are 'target', all others 'other', the rest, the cue included,
    is 'background'. Nothing overlaps. The cue, wherever it is, tells the targets.
    Counting may, too: its colour alone always has ``num_targets`` shapes.

    A picture depends on split, seed and index alone. Its parts come from
    scikit-image, without a download.

    Args:
        split (str): 'train' or 'val': which photographs, and which pictures.
        num_pictures (int): Length of the data set.
        seed (int): Of the pictures. Defaults to 0.
        size (int): Pixels per side of a picture. Defaults to 96.
        cue_size (int): Pixels per side of the cue, rim included, from 3. The rim has a
            seventh of it on each side, at least a pixel. Defaults to 14.
        shape_sizes (tuple[int, int]): Least and most pixels per side of the shapes.
            Defaults to (12, 18).
        num_colours (int): From 2 to 6. Defaults to 3.
        num_shapes (int): Defaults to 6.
        num_targets (int): How many of them have the cue's colour. Defaults to 2.
        **kwargs: See MMSegmentation's ``BaseSegDataset``.

    Raises:
        ValueError: If an argument is not as stated, or if so much does not fit.
    """

    METAINFO = dict(
        classes=('background', 'target', 'other'),
        palette=[[40, 40, 40], [60, 200, 90], [200, 70, 60]],
    )

    def __init__(
        self,
        split: str,
        num_pictures: int,
        seed: int = 0,
        size: int = 96,
        cue_size: int = 14,
        shape_sizes: tuple[int, int] = (12, 18),
        num_colours: int = 3,
        num_shapes: int = 6,
        num_targets: int = 2,
        **kwargs: Any,
    ) -> None:
        if split not in PHOTOGRAPHS:
            raise ValueError(f'split must be one of {[*PHOTOGRAPHS]}, got {split!r}')
        least = min(min(photo.shape[:2]) for photo in photographs(split))
        within = dict(
            size=(size, 1, least),
            cue_size=(cue_size, 3, size),
            num_colours=(num_colours, 2, len(COLOURS)),
            num_targets=(num_targets, 0, num_shapes),
            seed=(seed, 0, 2**32),
        )
        for name, (value, low, high) in within.items():
            if not low <= value <= high:
                raise ValueError(f'{name} must be from {low} to {high}, got {value!r}')
        if not 1 <= shape_sizes[0] <= shape_sizes[1] <= size:
            raise ValueError(f'shape_sizes must rise up to {size}, got {shape_sizes}')
        self.split = split
        self.num_pictures = num_pictures
        self.seed = seed
        self.size = size
        self.cue_size = cue_size
        self.shape_sizes = shape_sizes
        self.num_colours = num_colours
        self.num_shapes = num_shapes
        self.num_targets = num_targets
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        """Names of the pictures, of which there is no file."""
        return [
            dict(
                img_path=f'{self.split}-{self.seed}-{index:06d}.png',
                reduce_zero_label=False,
                seg_fields=['gt_seg_map'],
            )
            for index in range(self.num_pictures)
        ]

    def get_data_info(self, idx: int) -> dict:
        """A picture, BGR as a file would be loaded, and its labels, drawn."""
        info = super().get_data_info(idx)
        image, labels = self.draw(info['sample_idx'])
        info.update(
            img=np.ascontiguousarray(image[..., ::-1]),
            gt_seg_map=labels,
            img_shape=labels.shape,
            ori_shape=labels.shape,
        )
        return info

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw picture ``index``.

        Returns:
            tuple: Image (size, size, 3) uint8 RGB, labels (size, size) uint8.
        """
        rng = np.random.default_rng(
            [[*PHOTOGRAPHS].index(self.split), self.seed, index]
        )
        photos = photographs(self.split)
        photo = photos[rng.integers(len(photos))]
        top, left = (rng.integers(side - self.size + 1) for side in photo.shape[:2])
        image = photo[top : top + self.size, left : left + self.size].copy()
        labels = np.full(image.shape[:2], BACKGROUND, np.uint8)

        low, high = self.shape_sizes
        sides = rng.integers(low, high + 1, self.num_shapes).tolist()
        cue, *boxes = self._place(rng, [self.cue_size, *sides])

        order = rng.permutation(self.num_colours)
        rim = max(1, self.cue_size // 7)
        image[cue] = 255
        patch = tuple(slice(part.start + rim, part.stop - rim) for part in cue)
        self._paint(rng, image[patch], order[0])

        for number, (box, side) in enumerate(zip(boxes, sides)):
            is_target = number < self.num_targets
            colour = order[0] if is_target else rng.choice(order[1:])
            mask = np.ones((side, side), bool)
            if rng.random() < 0.5:
                offset = np.arange(side) - (side - 1) / 2
                mask = np.add.outer(offset**2, offset**2) <= side**2 / 4
            self._paint(rng, image[box], colour, mask)
            labels[box][mask] = TARGET if is_target else OTHER
        return image, labels

    def _place(
        self, rng: np.random.Generator, sides: list[int]
    ) -> list[tuple[slice, slice]]:
        """Places of squares that neither overlap nor touch."""
        for _ in range(ATTEMPTS):
            taken = np.zeros((self.size, self.size), bool)
            boxes = []
            for side in sides:
                # Where its corner may be: no taken pixel in the square.
                is_free = ~window_any(taken, side)
                places = np.flatnonzero(is_free)
                if not len(places):
                    break
                y, x = divmod(rng.choice(places), is_free.shape[1])
                boxes.append(np.s_[y : y + side, x : x + side])
                # A pixel around each stays free.
                taken[max(0, y - 1) : y + side + 1, max(0, x - 1) : x + side + 1] = True
            else:
                return boxes
        raise ValueError(
            f'no room for a cue of {self.cue_size} pixels and shapes of {sides[1:]} in '
            f'a picture of size {self.size}'
        )

    @staticmethod
    def _paint(
        rng: np.random.Generator,
        part: np.ndarray,
        colour: int,
        mask: np.ndarray | slice = np.s_[:],
    ) -> None:
        noise = rng.integers(-NOISE, NOISE + 1, part.shape)
        part[mask] = (COLOURS[colour] + noise).clip(0, 255)[mask]


def window_any(mask: np.ndarray, side: int) -> np.ndarray:
    """Whether there is a True in each square of a mask, by its first corner."""
    sums = np.pad(mask.cumsum(0, np.int32).cumsum(1, np.int32), ((1, 0), (1, 0)))
    rows = sums[side:] - sums[:-side]
    return rows[:, side:] > rows[:, :-side]
