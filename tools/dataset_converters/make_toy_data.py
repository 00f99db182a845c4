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
    """What COCO-WholeBody v1.0 tells of the person ``number`` of a scene.

    Keypoints are lists of (x, y, visibility) by turns, in pixels from the centre of the
    first one; visible is 2, hidden by a thing of a larger number 1, outside the image 0
    with x = y = 0. ``*_valid`` says if most of a part is seen.
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
        if key == 'keypoints':
            result['num_keypoints'] = int(inside.sum())
        else:
            result[key.replace('_kpts', '_valid')] = bool(seen.mean() > 0.5)
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


def write_coco(root: Path, counts: dict[str, int], size: int, seed: int) -> None:
    """Fill ``root`` like ``data/coco`` of MMDetection and MMPose."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights as Weights

    names = enumerate(Weights.COCO_V1.meta['categories'])
    kinds = [{'id': number, 'name': name} for number, name in names if number]
    kinds = [kind for kind in kinds if kind['name'] != 'N/A']
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
        persons = [one for one in things if 'keypoints' in one]
        things = [{key: one[key] for key in keys} for one in things]
        for prefix, suffix, found, known in (
            ('instances', '2017', things, kinds),
            ('coco_wholebody', '_v1.0', persons, kinds[:1]),
        ):
            content = {**common, 'annotations': found, 'categories': known}
            dump(content, root / f'annotations/{prefix}_{split}{suffix}.json')
    # What a detector found in the last split: the persons' own boxes.
    found = [
        {key: one[key] for key in ('image_id', 'category_id', 'bbox')} | {'score': 0.9}
        for one in persons
    ]
    name = 'COCO_val2017_detections_AP_H_56_person.json'
    dump(found, root / 'person_detection_results' / name)


#: Whose layout -> folder of the data set, what fills it.
WRITERS = {
    'ade20k': ('ADEChallengeData2016', write_ade20k),
    'coco': ('coco', write_coco),
    'imagenet': ('imagenet', write_imagenet),
}
TASKS = tuple(WRITERS)


def make_toy_data(
    task: str = 'ade20k',
    out: str | os.PathLike[str] = 'data/toy',
    num_train: int = 600,
    num_val: int = 24,
    size: int = 112,
    seed: int = 0,
) -> tuple[Path, bool]:
    """Write a toy data set, or reuse it if it is there already.

    It appears all at once. The same arguments give the same pixels.

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
        ValueError: If a number is too small.
        FileExistsError: If there is a data set that this function did not write.
    """
    record = dict(num_train=num_train, num_val=num_val, size=size, seed=seed)
    for (name, value), least in zip(record.items(), (1, 1, 64, 0)):
        if value < least:
            raise ValueError(f'{name} must be at least {least}, got {value!r}')
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


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add('--task', default='ade20k', choices=TASKS, help='whose layout')
    add('--out', default='data/toy', help='folder that gets the data')
    add('--num-train', type=int, default=600, help='training images')
    add('--num-val', type=int, default=24, help='validation images')
    add('--size', type=int, default=112, help='height and width')
    add('--seed', type=int, default=0, help='other seed, other data')
    try:
        root, drawn = make_toy_data(**vars(parser.parse_args()))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f'make_toy_data.py: {error}') from error
    print(f'{"drew" if drawn else "found"} {root}')


if __name__ == '__main__':
    main()
