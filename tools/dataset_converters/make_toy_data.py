"""Draw a small data set in the layout and format of a real one."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from toy_scene import ADE_CLASSES, Scene, draw_scene

__all__ = ['ADE_CLASSES', 'TASKS', 'make_toy_data']

RECORD = 'toy_data.json'
# Raise it when the drawings change: a set of an older version is drawn anew.
VERSION = 2
#: Drawn things that COCO knows: name in ADE20K -> number of the category.
COCO_CLASSES = {'person': 1, 'car': 3, 'boat': 9, 'ball': 37}
# Pairs of the body's keypoints, counted from 1 as in COCO's annotation files.
SKELETON = [
    *[(16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7)],
    *[(6, 8), (7, 9), (8, 10), (9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5)],
    *[(4, 6), (5, 7)],
]
#: Folder of ImageNet -> number of its class, the thing that shows it.
IMAGENET_CLASSES = {
    'n04254680': (805, 'ball'),  # soccer ball
    'n04285008': (817, 'car'),  # sports car
    'n04612504': (914, 'boat'),  # yawl
}


def save(image: np.ndarray, path: Path) -> None:
    """Write an image, into a JPEG nearly without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95, subsampling=0)


def dump(content: Any, path: Path) -> None:
    """Write a JSON file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def write_ade20k(root: Path, counts: dict[str, int], size: int, seed: int) -> None:
    """Fill ``root`` like ``ADEChallengeData2016``."""
    for place, (short, count) in enumerate(counts.items()):
        split = {'train': 'training', 'val': 'validation'}[short]
        for index in range(1, count + 1):
            scene = draw_scene(np.random.default_rng([seed, place, index]), size)
            name = f'{split}/ADE_{short}_{index:08d}'
            save(scene.image, root / f'images/{name}.jpg')
            save(scene.labels, root / f'annotations/{name}.png')


def write_imagenet(root: Path, counts: dict[str, int], size: int, seed: int) -> None:
    """Fill ``root`` like ``data/imagenet`` of MMPretrain; the classes take turns."""
    for place, (split, count) in enumerate(counts.items()):
        lines = []
        for index in range(1, count + 1):
            wnid = [*IMAGENET_CLASSES][index % len(IMAGENET_CLASSES)]
            number, thing = IMAGENET_CLASSES[wnid]
            scene = draw_scene(np.random.default_rng([seed, place, index]), size, thing)
            stem = 'ILSVRC2012_val' if split == 'val' else wnid
            name = f'{wnid}/{stem}_{index:08d}.JPEG'
            save(scene.image, root / split / name)
            lines.append(f'{name} {number}\n')
        (root / 'meta').mkdir(exist_ok=True)
        (root / f'meta/{split}.txt').write_text(''.join(sorted(lines)))


def describe_person(
    keypoints: dict[str, np.ndarray], instances: np.ndarray, number: int
) -> dict[str, Any]:
    """What COCO-WholeBody v1.0 tells of a person beyond COCO's instances.

    Args:
        keypoints (dict): As in ``Scene.things``.
        instances (np.ndarray): As in ``Scene``.
        number (int): The person's number there; larger ones are in front.

    Returns:
        dict: Five lists of keypoints, (x, y, visibility) by turns, in pixels from the
        centre of the first one; visible is 2, hidden by a thing in front 1, outside
        the image 0 with x = y = 0. Of the body ``num_keypoints`` are inside. Of face,
        hands and feet ``*_valid`` says if most are seen, of face and hands ``*_box``
        is the box (x, y, width, height) of what is inside.
    """
    size = len(instances)
    result: dict[str, Any] = {}
    for key, points in keypoints.items():
        inside = ((points >= 0) & (points < 1)).all(1)
        places = np.where(inside[:, None], points * size, 0)
        column, row = places.astype(int).T
        seen = inside & (instances[row, column] <= number)
        # The outer half of the pixels at the edge lies beyond their centres.
        places = np.where(inside[:, None], (places - 0.5).clip(0, size - 1), 0).round(2)
        result[key] = np.c_[places, inside + seen.astype(int)].ravel().tolist()
        part = key.removesuffix('_kpts')
        if part == 'keypoints':
            result['num_keypoints'] = int(inside.sum())
            continue
        result[f'{part}_valid'] = bool(seen.mean() > 0.5)
        if part != 'foot':
            found = places[inside] if inside.any() else np.zeros((1, 2))
            box = np.concatenate((found.min(0), np.ptp(found, 0)))
            result[f'{part}_box'] = box.round(2).tolist()
    return result


def annotate(scene: Scene) -> list[dict[str, Any]]:
    """Annotate what COCO knows and what fills a hundredth of the image or more."""
    from pycocotools import mask as tools

    found = []
    for number, (name, keypoints) in enumerate(scene.things, 1):
        mask = scene.instances == number
        if name not in COCO_CLASSES or mask.mean() < 0.01:
            continue
        runs = tools.encode(np.asfortranarray(mask))
        annotation = {
            'category_id': COCO_CLASSES[name],
            'bbox': tools.toBbox(runs).tolist(),
            'area': int(mask.sum()),
            'segmentation': {'size': runs['size'], 'counts': runs['counts'].decode()},
            'iscrowd': 0,
        }
        if keypoints is not None:
            annotation |= describe_person(keypoints, scene.instances, number)
        found.append(annotation)
    return found


def detect(person: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A detection of a person, off by up to a twentieth of its box."""
    box = np.array(person['bbox'])
    box += rng.uniform(-0.05, 0.05, 4) * np.tile(box[2:], 2)
    found = {key: person[key] for key in ('image_id', 'category_id')}
    return {**found, 'bbox': box.tolist(), 'score': rng.uniform(0.51, 0.99)}


def write_coco(root: Path, counts: dict[str, int], size: int, seed: int) -> None:
    """Fill ``root`` like ``data/coco`` of MMDetection and MMPose."""
    from torchvision.models import detection

    names = detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta['categories']
    body = detection.KeypointRCNN_ResNet50_FPN_Weights.COCO_V1.meta['keypoint_names']
    kinds = [{'id': n, 'name': k} for n, k in enumerate(names) if n and k != 'N/A']
    person = {**kinds[0], 'keypoints': body, 'skeleton': SKELETON}
    keys = ('id', 'image_id', 'category_id', 'bbox', 'area', 'segmentation', 'iscrowd')
    for place, (split, count) in enumerate(counts.items()):
        images, things = [], []
        for index in range(1, count + 1):
            rng, found = np.random.default_rng([seed, place, index]), []
            while not any('keypoints' in one for one in found):  # there is a person
                scene = draw_scene(rng, size)
                found = annotate(scene)
            name = f'{index:012d}.jpg'
            save(scene.image, root / f'{split}2017' / name)
            images.append(dict(id=index, file_name=name, height=size, width=size))
            for one in found:
                things.append({'id': len(things) + 1, 'image_id': index, **one})
        common = {'info': {}, 'licenses': [], 'images': images}
        instances = [{key: one[key] for key in keys} for one in things]
        content = {**common, 'annotations': instances, 'categories': kinds}
        dump(content, root / f'annotations/instances_{split}2017.json')
        persons = [one for one in things if 'keypoints' in one]
        content = {**common, 'annotations': persons, 'categories': [person]}
        dump(content, root / f'annotations/coco_wholebody_{split}_v1.0.json')
    rng = np.random.default_rng([seed, len(counts)])
    detections = [detect(one, rng) for one in persons]  # of the last split
    name = 'COCO_val2017_detections_AP_H_56_person.json'
    dump(detections, root / 'person_detection_results' / name)


#: Whose layout -> folder of the data set, what fills it.
WRITERS = {
    'ade20k': ('ADEChallengeData2016', write_ade20k),
    'coco': ('coco', write_coco),
    'imagenet': ('imagenet', write_imagenet),
}
TASKS = tuple(WRITERS)
#: The least and the most.
LIMITS = dict(
    num_train=(1, 99_999), num_val=(1, 99_999), size=(64, 2048), seed=(0, 2**32 - 1)
)


def make_toy_data(
    task: str = 'ade20k',
    out: str | os.PathLike[str] = 'data/toy',
    num_train: int = 600,
    num_val: int = 24,
    size: int = 112,
    seed: int = 0,
) -> tuple[Path, bool]:
    """Write a toy data set, or reuse it if it is there already.

    It appears all at once. An interrupted run leaves nothing, a killed one a hidden
    folder beside it. The same arguments give the same pixels.

    Args:
        task (str): Whose layout and format, one of ``TASKS``.
        out (str or PathLike): Folder that gets the data set's own folder.
        num_train (int): Number of training images.
        num_val (int): Number of validation images.
        size (int): Height and width of the images in pixels.
        seed (int): Another seed, other data.

    Returns:
        tuple[Path, bool]: The data set's folder, and whether it was drawn now.

    Raises:
        ValueError: If a value is out of its ``LIMITS``.
        FileExistsError: If there is a data set that this function did not write.
    """
    if task not in WRITERS:
        raise ValueError(f'task must be one of {", ".join(TASKS)}, got {task!r}')
    record = dict(num_train=num_train, num_val=num_val, size=size, seed=seed)
    for name, value in record.items():
        low, high = LIMITS[name]
        if type(value) is not int or not low <= value <= high:
            raise ValueError(
                f'{name} must be a whole number from {low} to {high}, got {value!r}'
            )
    record |= dict(task=task, version=VERSION)

    folder, write = WRITERS[task]
    root = Path(out) / folder
    if root.exists():
        if not (root / RECORD).is_file():
            raise FileExistsError(
                f'{root} exists and is no toy data set (it has no {RECORD}): '
                'choose another folder'
            )
        if json.loads((root / RECORD).read_text()) == record:
            return root, False

    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{folder}.', dir=root.parent) as hidden:
        # That one is for its owner's eyes only, those in it are as others.
        partial = Path(hidden, folder)
        partial.mkdir()
        write(partial, dict(train=num_train, val=num_val), size, seed)
        dump(record, partial / RECORD)
        if root.exists():
            shutil.rmtree(root)
        partial.rename(root)
    return root, True


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--task', default='ade20k', choices=TASKS, help='whose layout')
    parser.add_argument('--out', default='data/toy', help='folder that gets the data')
    parser.add_argument('--num-train', type=int, default=600, help='training images')
    parser.add_argument('--num-val', type=int, default=24, help='validation images')
    parser.add_argument('--size', type=int, default=112, help='height and width')
    parser.add_argument('--seed', type=int, default=0, help='other seed, other data')
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    try:
        root, drawn = make_toy_data(**vars(parse_args()))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f'make_toy_data.py: {error}') from error
    print(f'{"drew" if drawn else "found"} {root}')


if __name__ == '__main__':
    main()
