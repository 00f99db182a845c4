"""Toy data in the layout and format of COCO and COCO-WholeBody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .drawing import Figure, save_jpeg
from .pose import BODY_NAMES, BODY_SKELETON, locate_keypoints
from .scene import Scene, draw_scene

# In the order of their ids, which run from 1 to 90 with gaps.
_NAMES = (
    *('person', 'bicycle', 'car', 'motorcycle', 'airplane', 'bus', 'train', 'truck'),
    *('boat', 'traffic light', 'fire hydrant', 'stop sign', 'parking meter', 'bench'),
    *('bird', 'cat', 'dog', 'horse', 'sheep', 'cow', 'elephant', 'bear', 'zebra'),
    *('giraffe', 'backpack', 'umbrella', 'handbag', 'tie', 'suitcase', 'frisbee'),
    *('skis', 'snowboard', 'sports ball', 'kite', 'baseball bat', 'baseball glove'),
    *('skateboard', 'surfboard', 'tennis racket', 'bottle', 'wine glass', 'cup'),
    *('fork', 'knife', 'spoon', 'bowl', 'banana', 'apple', 'sandwich', 'orange'),
    *('broccoli', 'carrot', 'hot dog', 'pizza', 'donut', 'cake', 'chair', 'couch'),
    *('potted plant', 'bed', 'dining table', 'toilet', 'tv', 'laptop', 'mouse'),
    *('remote', 'keyboard', 'cell phone', 'microwave', 'oven', 'toaster', 'sink'),
    *('refrigerator', 'book', 'clock', 'vase', 'scissors', 'teddy bear'),
    *('hair drier', 'toothbrush'),
)
_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
CATEGORIES: dict[str, int] = dict(
    zip(_NAMES, (number for number in range(1, 91) if number not in _GAPS), strict=True)
)
# Drawn things that COCO knows: name in ADE_CLASSES -> name in CATEGORIES.
THINGS = {'person': 'person', 'car': 'car', 'boat': 'boat', 'ball': 'sports ball'}

_SPLITS = ('train', 'val')
_DETECTIONS = 'COCO_val2017_detections_AP_H_56_person.json'
# A thing of which less is seen, as a share of the image, is not annotated.
_MIN_SHARE = 0.01
# What is told of every thing; the rest is about persons.
_INSTANCE_KEYS = ('category_id', 'bbox', 'area', 'segmentation', 'iscrowd')


def encode_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Run lengths of a mask, as in COCO's annotation files.

    Args:
        mask (np.ndarray): (H, W), bool.

    Returns:
        dict[str, list[int]]: ``size``, which is [H, W], and ``counts``: the
        lengths of the runs down one column after the other, beginning with
        one of False, which may have length 0.
    """
    pixels = mask.ravel(order='F')
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff(changes, prepend=0, append=pixels.size).tolist()
    return {'size': list(mask.shape), 'counts': [0] * bool(pixels[0]) + counts}


def _is_person(annotation: dict[str, Any]) -> bool:
    return annotation['category_id'] == CATEGORIES['person']


def _tight_box(mask: np.ndarray) -> list[int]:
    """The smallest box, [x, y, width, height] in pixels, round a mask's pixels."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]


def describe_things(scene: Scene) -> list[dict[str, Any]]:
    """Annotations of the things that COCO knows and that are seen well enough.

    Args:
        scene (Scene): A drawn image.

    Returns:
        list[dict]: From back to front, each with ``category_id``, ``bbox``
        (x, y, width, height in pixels), ``area`` (in pixels),
        ``segmentation`` (run lengths of what is seen of it) and ``iscrowd``;
        a person also has what ``describe_person`` finds.
    """
    found = []
    for number, thing in enumerate(scene.things, 1):
        mask = scene.instances == number
        if thing.name not in THINGS or mask.mean() < _MIN_SHARE:
            continue
        annotation = {
            'category_id': CATEGORIES[THINGS[thing.name]],
            'bbox': _tight_box(mask),
            'area': int(mask.sum()),
            'segmentation': encode_rle(mask),
            'iscrowd': 0,
        }
        if thing.figure is not None:
            annotation |= describe_person(thing.figure, scene.instances, number)
        found.append(annotation)
    return found


def describe_person(
    figure: Figure, instances: np.ndarray, number: int
) -> dict[str, Any]:
    """What COCO-WholeBody v1.0 tells of a person beyond COCO's instances.

    Args:
        figure (Figure): The person.
        instances (np.ndarray): (size, size), uint8, which thing a pixel shows.
        number (int): The person's number there; larger ones are in front.

    Returns:
        dict: Five lists of keypoints, (x, y, visibility) by turns, where x and
        y count pixels from the centre of the first one, and visibility is
        2 if seen, 1 if a thing in front hides it and 0 outside the image, with
        x = y = 0. ``num_keypoints`` of the body are inside. For face, hands
        and feet ``*_valid`` says if most of them are seen; for face and hands
        ``*_box`` is the box (x, y, width, height) of what is inside, all 0 if
        nothing is.
    """
    size = len(instances)
    result: dict[str, Any] = {}
    for key, points in locate_keypoints(figure).items():
        pixels = np.floor(points * size).astype(int)
        inside = ((pixels >= 0) & (pixels < size)).all(1)
        column, row = np.where(inside[:, None], pixels, 0).T
        seen = inside & (instances[row, column] <= number)
        # Points within half a pixel of the image's edge belong to its last pixel.
        places = np.clip(points * size - 0.5, 0, size - 1).round(2)
        places = np.where(inside[:, None], places, 0)
        flags = inside.astype(int) + seen
        result[key] = [
            value
            for (x, y), flag in zip(places.tolist(), flags.tolist(), strict=True)
            for value in (x, y, flag)
        ]
        part = key.removesuffix('_kpts')
        if part == 'keypoints':
            result['num_keypoints'] = int(inside.sum())
            continue
        result[f'{part}_valid'] = bool(seen.mean() > 0.5)
        if part != 'foot':
            low = high = np.zeros(2)
            if inside.any():
                low, high = places[inside].min(0), places[inside].max(0)
            result[f'{part}_box'] = [*low.tolist(), *(high - low).round(2).tolist()]
    return result


def draw_with_person(
    seed: int, place: int, index: int, size: int
) -> tuple[Scene, list[dict[str, Any]]]:
    """Draw scenes until one has a person that is annotated.

    Args:
        seed (int): Seed of the data set.
        place (int): 0 for training, 1 for validation.
        index (int): Number of the image, from 1 on.
        size (int): Height and width in pixels.

    Returns:
        tuple[Scene, list[dict]]: The same for the same arguments: the scene
        and what ``describe_things`` finds in it.
    """
    attempt = 0
    while True:
        scene = draw_scene(np.random.default_rng([seed, place, index, attempt]), size)
        found = describe_things(scene)
        if any(_is_person(one) for one in found):
            return scene, found
        attempt += 1


def _detect(
    image_id: int, box: list[int], size: int, rng: np.random.Generator
) -> dict[str, Any]:
    """A detection of a person, each edge off by up to a twentieth of the box."""
    x, y, width, height = box
    shift = rng.uniform(-0.05, 0.05, 4) * (width, height, width, height)
    edges = np.clip(np.add((x, y, x + width, y + height), shift), 0, size)
    left, top, right, bottom = edges.tolist()
    return {
        'image_id': image_id,
        'category_id': CATEGORIES['person'],
        'bbox': [round(value, 2) for value in (left, top, right - left, bottom - top)],
        'score': round(rng.uniform(0.51, 0.99), 4),
    }


def _dump(content: Any, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, separators=(',', ':')))


def _write_annotations(
    folder: Path,
    split: str,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
) -> None:
    """Write the instances of all categories and the whole bodies of persons."""
    common = {
        'info': {'description': 'Drawn toy data'},
        'licenses': [],
        'images': images,
    }
    keys = ('id', 'image_id', *_INSTANCE_KEYS)
    instances = [{key: one[key] for key in keys} for one in annotations]
    categories = [{'id': number, 'name': name} for name, number in CATEGORIES.items()]
    _dump(
        common | {'annotations': instances, 'categories': categories},
        folder / f'instances_{split}2017.json',
    )
    persons = [one for one in annotations if _is_person(one)]
    category = {
        'id': CATEGORIES['person'],
        'name': 'person',
        'keypoints': BODY_NAMES,
        'skeleton': BODY_SKELETON,
    }
    _dump(
        common | {'annotations': persons, 'categories': [category]},
        folder / f'coco_wholebody_{split}_v1.0.json',
    )


def write(root: Path, num_train: int, num_val: int, size: int, seed: int) -> None:
    """Fill ``root`` like ``data/coco`` of MMDetection and MMPose.

    Args:
        root (Path): An empty folder.
        num_train (int): Number of training images.
        num_val (int): Number of validation images.
        size (int): Height and width of the images in pixels.
        seed (int): Decides what is drawn and detected.
    """
    detections = []
    counts = (num_train, num_val)
    for place, (split, count) in enumerate(zip(_SPLITS, counts, strict=True)):
        folder = root / f'{split}2017'
        folder.mkdir()
        images, annotations = [], []
        for index in range(1, count + 1):
            scene, found = draw_with_person(seed, place, index, size)
            name = f'{index:012d}.jpg'
            save_jpeg(scene.image, folder / name)
            images.append(
                {'id': index, 'file_name': name, 'height': size, 'width': size}
            )
            for one in found:
                identity = {'id': len(annotations) + 1, 'image_id': index}
                annotations.append(identity | one)
            if split == 'val':
                rng = np.random.default_rng([seed, len(_SPLITS), index])
                boxes = [one['bbox'] for one in found if _is_person(one)]
                detections += [_detect(index, box, size, rng) for box in boxes]
        _write_annotations(root / 'annotations', split, images, annotations)
    _dump(detections, root / 'person_detection_results' / _DETECTIONS)
