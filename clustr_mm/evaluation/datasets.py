"""Which files a config tests on, and where they come from."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

COCO = 'COCO 2017, https://cocodataset.org/#download'

#: Where the images and annotations of a data set are to be had.
SOURCES = {
    'CocoDataset': COCO,
    'CocoWholeBodyDataset': COCO,
    'ADE20KDataset': 'http://data.csail.mit.edu/places/ADEchallenge/'
    'ADEChallengeData2016.zip',
    'ImageNet': 'https://image-net.org/download',
}

#: And those that come from elsewhere.
WHOLE_BODY = 'COCO-WholeBody V1.0, https://github.com/jin-s13/COCO-WholeBody'
DETECTIONS = (
    'person detections, https://mmpose.readthedocs.io/en/latest/dataset_zoo/'
    '2d_wholebody_keypoint.html#coco-wholebody'
)


def missing_data(config: Config) -> str | None:
    """Check that the data a config tests on is there.

    Args:
        config (Config): The config. Its paths are relative to the working
            directory.

    Returns:
        str: What was looked for and where to get it, in one line; None if nothing
        is missing.
    """
    missing: dict[str, list[str]] = {}
    for path, source in dict(_wanted(config)).items():
        if not _is_there(path):
            missing.setdefault(source, []).append(path)
    if not missing:
        return None
    parts = [f'{", ".join(paths)} ({source})' for source, paths in missing.items()]
    return f'data missing: {"; ".join(parts)}'


def _wanted(config: Config) -> Iterator[tuple[str, str]]:
    """Paths, and where each comes from."""
    annotations = 'its data set'
    for dataset in _datasets(config.test_dataloader.dataset):
        root = dataset.get('data_root') or ''
        images = SOURCES.get(dataset.get('type'), 'its data set')
        if 'toy' in Path(root).parts:
            images = 'python tools/make_toy_data.py'
        annotations = images
        if dataset.get('type') == 'CocoWholeBodyDataset':
            annotations = WHOLE_BODY
        prefix = dataset.get('data_prefix') or dataset.get('split') or {}
        folders = prefix.values() if isinstance(prefix, Mapping) else [prefix]
        for folder in folders:
            yield os.path.join(root, folder or ''), images
        if dataset.get('ann_file'):
            yield os.path.join(root, dataset.ann_file), annotations
        if dataset.get('bbox_file'):
            yield dataset.bbox_file, DETECTIONS
    evaluators = config.get('test_evaluator') or []
    for evaluator in [evaluators] if isinstance(evaluators, Mapping) else evaluators:
        if evaluator.get('ann_file'):
            yield evaluator['ann_file'], annotations


def _datasets(dataset: Any) -> Iterator[Any]:
    """A data set, or those inside it."""
    inner = dataset.get('datasets') or dataset.get('dataset')
    if inner is None:
        yield dataset
        return
    for one in [inner] if isinstance(inner, Mapping) else inner:
        yield from _datasets(one)


def _is_there(path: str) -> bool:
    # What is not on a disk is left to the run.
    if '://' in path:
        return True
    return any(Path(path).iterdir()) if os.path.isdir(path) else os.path.isfile(path)
