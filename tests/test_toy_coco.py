"""Toy data in COCO's place, as pycocotools and the stock toolboxes see them."""

import json

import numpy as np
import pytest
from make_toy_data import describe_person, make_toy_data
from mmengine.hub import get_config
from mmengine.registry import DATASETS, init_default_scope
from toy_scene import pose

import clustr_mm  # noqa: F401  lets mmdet import with mmcv-lite

NUM_TRAIN, NUM_VAL, SIZE = 5, 8, 96
INSTANCES = '_base_/datasets/coco_instance.py'
WHOLE_BODY = (
    'wholebody_2d_keypoint/topdown_heatmap/coco-wholebody/'
    'td-hm_res50_8xb64-210e_coco-wholebody-256x192.py'
)
PARTS = dict(
    keypoints=17, foot_kpts=6, face_kpts=68, lefthand_kpts=21, righthand_kpts=21
)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder from where ``data/coco`` is found."""
    folder = tmp_path_factory.mktemp('place')
    make_toy_data('coco', folder / 'data', NUM_TRAIN, NUM_VAL, SIZE)
    return folder


@pytest.fixture(scope='module')
def coco(place):
    """The content of COCO's annotation files by their names."""
    files = (place / 'data/coco').rglob('*.json')
    return {file.stem: json.loads(file.read_text()) for file in files}


def triplets(person):
    """All keypoints, (133, 3)."""
    return np.concatenate([person[part] for part in PARTS]).reshape(-1, 3)


def stock_dataset(toolbox, config, loader, **changes):
    """The dataset of a stock config, whose paths begin at the working folder."""
    init_default_scope(toolbox)
    config = get_config(f'{toolbox}::{config}')
    return DATASETS.build({**config[f'{loader}_dataloader'].dataset, **changes})


def test_coco_layout(place, coco):
    from mmdet.datasets import CocoDataset

    root = place / 'data/coco'
    for split, count in (('train', NUM_TRAIN), ('val', NUM_VAL)):
        things = coco[f'instances_{split}2017']
        files = sorted(file.name for file in (root / f'{split}2017').iterdir())
        assert len(files) == count
        for entry, name in zip(things['images'], files, strict=True):
            assert entry == dict(id=int(name[:12]), file_name=name, height=96, width=96)
        categories = {one['name']: one['id'] for one in things['categories']}
        assert tuple(categories) == CocoDataset.METAINFO['classes']
        assert (categories['boat'], max(categories.values())) == (9, 90)
        # The whole bodies are the persons of the instances, told more of.
        persons = [one for one in things['annotations'] if one['category_id'] == 1]
        bodies = coco[f'coco_wholebody_{split}_v1.0']['annotations']
        for one, more in zip(persons, bodies, strict=True):
            assert one.items() <= more.items()
        assert {one['image_id'] for one in persons} == set(range(1, count + 1))
    detections = coco['COCO_val2017_detections_AP_H_56_person']
    for found, person in zip(detections, persons, strict=True):
        assert 0.5 < found.pop('score') < 1
        assert found.items() <= person.items()


def test_left_is_the_persons_own():
    from mmpose.datasets import CocoWholeBodyDataset

    meta = CocoWholeBodyDataset(lazy_init=True).metainfo
    found = pose(np.array([[0.3, 0.5]] * 2))
    assert {key: len(points) for key, points in found.items()} == PARTS
    points = np.concatenate([found[part] for part in PARTS])
    np.testing.assert_allclose(
        points * (-1, 1), points[meta['flip_indices']], atol=1e-9
    )
    places = dict(zip(meta['keypoint_name2id'], points, strict=True))
    assert all(x > 0 for name, (x, _) in places.items() if name.startswith('left'))
    # The viewer's left is the person's right, where a face's points begin.
    x, y = found['face_kpts'].T
    assert (np.diff(x[:17]) > 0).all() and (x[36:42] < 0).all()
    assert x[36] < x[39] and y[37] > y[41]
    assert x[48] < x[54] and y[51] > y[57] and x[60] < x[64] and y[62] > y[66]
    # Palms to the thighs: the thumb and the big toe are on the inner side.
    assert places['left_thumb4'][0] < places['left_pinky_finger4'][0]
    assert places['left_big_toe'][0] < places['left_small_toe'][0]


def test_visibility_of_keypoints():
    points = {
        key: (0, 0.95) + 0.8 * xy * (1, -1) for key, xy in pose(np.ones((2, 2))).items()
    }
    points = {key: xy + (0.5, 0) for key, xy in points.items()}
    instances = np.zeros((50, 50), np.uint8)
    instances[:30] = 2
    found = describe_person(points, instances, 2)
    assert found['num_keypoints'] == 17 and set(triplets(found)[:, 2]) == {2}
    expected = np.concatenate([points[part] for part in PARTS]) * 50 - 0.5
    np.testing.assert_allclose(triplets(found)[:, :2], expected, atol=0.006)

    # Only what is in front hides; what is behind and the background do not.
    assert describe_person(points, instances, 3) == found
    hidden = triplets(describe_person(points, instances, 1))
    np.testing.assert_array_equal(hidden[:, 2], np.where(hidden[:, 1] < 29.5, 1, 2))

    # Moved up until the head is outside.
    above = {key: xy - (0, 0.3) for key, xy in points.items()}
    above = describe_person(above, instances, 2)
    assert not any(above['face_kpts'])
    assert found['face_valid'] and not above['face_valid'] and above['foot_valid']
    assert above['num_keypoints'] == 12


def test_keypoints_lie_on_their_person(coco):
    from pycocotools import mask as tools

    for person in coco['coco_wholebody_val_v1.0']['annotations']:
        mask = np.pad(tools.decode(person['segmentation']), 1)
        for x, y, flag in triplets(person):
            row, column = round(y), round(x)
            assert flag < 2 or mask[row : row + 3, column : column + 3].any()


@pytest.mark.parametrize(('shift', 'low', 'high'), [(0, 1, 1), (8, 0, 0.9)])
def test_mmdet_scores_the_truth(place, coco, monkeypatch, shift, low, high):
    """The annotations as predictions, moved right by ``shift``."""
    import torch
    from mmdet.evaluation import CocoMetric

    monkeypatch.chdir(place)
    assert len(stock_dataset('mmdet', INSTANCES, 'train')) == NUM_TRAIN
    data = stock_dataset('mmdet', INSTANCES, 'val')
    file = 'data/coco/annotations/instances_val2017.json'
    metric = CocoMetric(file, ['bbox', 'segm'])
    metric.dataset_meta = data.metainfo
    for item in data:
        sample = item['data_samples']
        truth = sample.gt_instances
        boxes = truth.bboxes.tensor + torch.tensor((shift, 0, shift, 0))
        masks = torch.from_numpy(truth.masks.masks).roll(shift, 2).bool()
        scores = torch.ones(len(boxes))
        found = dict(bboxes=boxes, labels=truth.labels, scores=scores, masks=masks)
        image = dict(img_id=sample.img_id, ori_shape=sample.ori_shape)
        metric.process({}, [dict(image, pred_instances=found)])
    scores = metric.evaluate(len(data))
    assert low <= scores['coco/bbox_mAP'] <= high
    assert low <= scores['coco/segm_mAP'] <= high


@pytest.mark.parametrize(('shift', 'low', 'high'), [(0, 0.999, 1), (8, 0, 0.5)])
def test_mmpose_scores_the_truth(place, coco, monkeypatch, shift, low, high):
    """The annotations as predictions, moved right by ``shift``."""
    from mmpose.evaluation import CocoWholeBodyMetric

    monkeypatch.chdir(place)
    train = stock_dataset('mmpose', WHOLE_BODY, 'train')
    persons = coco['coco_wholebody_train_v1.0']['annotations']
    for index, person in enumerate(persons):
        info = train.get_data_info(index)
        np.testing.assert_allclose(info['keypoints'][0], triplets(person)[:, :2])
    assert train[0]['data_samples'].gt_fields.heatmaps.shape == (133, 64, 48)
    # By default the detected boxes are evaluated.
    detected = coco['COCO_val2017_detections_AP_H_56_person']
    assert len(stock_dataset('mmpose', WHOLE_BODY, 'val')) == len(detected)

    data = stock_dataset('mmpose', WHOLE_BODY, 'val', bbox_file=None)
    metric = CocoWholeBodyMetric('data/coco/annotations/coco_wholebody_val_v1.0.json')
    metric.dataset_meta = data.metainfo
    for index in range(len(data)):
        info = data.get_data_info(index)
        found = dict(keypoints=info['keypoints'] + (shift, 0))
        found['keypoint_scores'] = np.ones((1, 133))
        sample = dict(id=info['id'], img_id=info['img_id'], gt_instances={})
        metric.process({}, [dict(sample, pred_instances=found)])
    assert low <= metric.evaluate(len(data))['coco-wholebody/AP'] <= high
