"""Small drawn data sets in the layouts of the real ones.

They let the stock runners, pipelines and metrics of the toolboxes run from end
to end within minutes and without a download.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import ade20k, coco, imagenet
from .drawing import ADE_CLASSES
from .scene import draw_scene

__all__ = ['ADE_CLASSES', 'TASKS', 'draw_scene', 'make_toy_data']

# Raise it when the drawings change: a set of an older version is drawn anew.
_VERSION = 1
_RECORD = 'toy_data.json'


class _Task(NamedTuple):
    folder: str
    write: Callable[[Path, int, int, int, int], None]


_TASKS = {
    'ade20k': _Task('ADEChallengeData2016', ade20k.write),
    'coco': _Task('coco', coco.write),
    'imagenet': _Task('imagenet', imagenet.write),
}
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

    It appears all at once. An interrupted run leaves nothing, a killed one a
    hidden folder beside it. The same parameters give the same pixels.

    Args:
        task (str): Whose layout and format, one of ``TASKS``.
        out (str or PathLike): Folder that gets the data set's own folder:
            ``ADEChallengeData2016``, ``coco`` or ``imagenet``.
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

    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f'.{root.name}.', dir=root.parent
    ) as folder:
        # That one is for its owner's eyes only, those in it are as others.
        partial = Path(folder, root.name)
        partial.mkdir()
        _TASKS[task].write(partial, num_train, num_val, size, seed)
        (partial / _RECORD).write_text(json.dumps(record, indent=2) + '\n')
        if root.exists():
            shutil.rmtree(root)
        partial.rename(root)
    return root, True
