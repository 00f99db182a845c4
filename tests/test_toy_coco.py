"""Toy data in COCO's place, as pycocotools and the stock toolboxes see them."""

import json

import numpy as np
import pytest
from PIL import Image

from clustr_mm.toy_data import ADE_CLASSES, make_toy_data
from clustr_mm.toy_data.coco import (
    CATEGORIES,
    THINGS,
    describe_person,
    describe_things,
    draw_with_person,
    encode_rle,
)
from clustr_mm.toy_data.drawing import Figure
from clustr_mm.toy_data.pose import BODY_NAMES, BODY_SKELETON, locate_keypoints
from clustr_mm.toy_data.scene import Scene, Thing

NUM_TRAIN, NUM_VAL, SIZE = 7, 11, 96
WHOLE_BODY = 'wholebody_2d_keypoint/topdown_heatmap/coco-wholebody/'
WHOLE_BODY += 'td-hm_res50_8xb64-210e_coco-wholebody-256x192.py'
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


def decode(annotation):
    from pycocotools import mask

    height, width = annotation['segmentation']['size']
    runs = mask.frPyObjects(annotation['segmentation'], height, width)
    return mask.decode(runs).astype(bool)


def triplets(person, *parts):
    """Keypoints, (K, 3), of some parts or all."""
    return np.concatenate([person[part] for part in parts or PARTS]).reshape(-1, 3)


def stock_dataset(toolbox, config, loader, **changes):
    """The dataset of a stock config, whose paths begin at the working folder."""
    from mmengine.hub import get_config
    from mmengine.registry import DATASETS, init_default_scope

    init_default_scope(toolbox)
    config = get_config(f'{toolbox}::{config}')
    return DATASETS.build({**config[f'{loader}_dataloader'].dataset, **changes})


def test_coco_layout(place, coco):
    root = place / 'data/coco'
    files = {str(file.relative_to(root)) for file in root.rglob('*') if file.is_file()}
    images = {
        f'{split}2017/{number:012d}.jpg'
        for split, count in (('train', NUM_TRAIN), ('val', NUM_VAL))
        for number in range(1, count + 1)
    }
    assert files == images | {
        'toy_data.json',
        'annotations/instances_train2017.json',
        'annotations/instances_val2017.json',
        'annotations/coco_wholebody_train_v1.0.json',
        'annotations/coco_wholebody_val_v1.0.json',
        'person_detection_results/COCO_val2017_detections_AP_H_56_person.json',
    }
    for name in images:
        image = Image.open(root / name)
        assert (image.mode, image.size) == ('RGB', (SIZE, SIZE))
    for split, count in (('train', NUM_TRAIN), ('val', NUM_VAL)):
        things = coco[f'instances_{split}2017']
        persons = coco[f'coco_wholebody_{split}_v1.0']
        assert things['images'] == persons['images']
        listed = [(one['id'], one['file_name']) for one in things['images']]
        assert listed == [(n, f'{n:012d}.jpg') for n in range(1, count + 1)]
        ids = [one['id'] for one in things['annotations']]
        assert len(set(ids)) == len(ids)
        # The whole bodies are the persons of the instances, told more of.
        expected = [one for one in things['annotations'] if one['category_id'] == 1]
        for one, more in zip(expected, persons['annotations'], strict=True):
            assert one.items() <= more.items()
        assert {one['image_id'] for one in expected} == set(range(1, count + 1))


def test_coco_categories(coco):
    from mmdet.datasets import CocoDataset

    for split in ('train', 'val'):
        listed = coco[f'instances_{split}2017']['categories']
        listed = [(one['id'], one['name']) for one in listed]
        assert listed == sorted(listed)
        assert tuple(name for _, name in listed) == CocoDataset.METAINFO['classes']
        gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
        assert {number for number, _ in listed} == set(range(1, 91)) - gaps
    known = {name: CATEGORIES[name] for name in THINGS.values()}
    assert known == {'person': 1, 'car': 3, 'boat': 9, 'sports ball': 37}


@pytest.mark.parametrize('pattern', ['none', 'all', 'first', 'last', 'random'])
def test_run_lengths_are_those_of_pycocotools(pattern):
    from pycocotools import mask as tools

    mask = np.zeros((5, 7), bool)
    if pattern == 'random':
        mask = np.random.default_rng(0).random((5, 7)) < 0.5
    elif pattern == 'all':
        mask[:] = True
    elif pattern != 'none':
        mask.flat[0 if pattern == 'first' else -1] = True
    runs = json.loads(json.dumps(encode_rle(mask)))
    assert runs['size'] == [5, 7]
    assert tools.frPyObjects(runs, 5, 7) == tools.encode(np.asfortranarray(mask))


def test_coco_masks_are_what_is_seen(place, coco):
    from pycocotools import mask as tools

    seen = set()
    names = {CATEGORIES[known]: name for name, known in THINGS.items()}
    for image in coco['instances_val2017']['images']:
        scene, _ = draw_with_person(0, 1, image['id'], SIZE)
        saved = np.array(Image.open(place / 'data/coco/val2017' / image['file_name']))
        assert abs(saved.astype(int) - scene.image).mean() < 6
        rest = np.isin(scene.labels, [ADE_CLASSES[name][0] for name in THINGS])
        for one in coco['instances_val2017']['annotations']:
            if one['image_id'] != image['id']:
                continue
            mask = decode(one)
            name = names[one['category_id']]
            assert (scene.labels[mask] == ADE_CLASSES[name][0]).all()
            assert rest[mask].all()
            rest &= ~mask
            assert one['area'] == mask.sum() >= 0.01 * SIZE**2
            rows, columns = np.nonzero(mask)
            x, y, width, height = one['bbox']
            assert (x, y) == (columns.min(), rows.min())
            assert (width, height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)
            runs = tools.encode(np.asfortranarray(mask))
            assert one['bbox'] == list(tools.toBbox(runs))
            assert one['iscrowd'] == 0
            seen.add(name)
        assert rest.mean() < 0.02
    assert seen == set(THINGS)


def test_hidden_things_are_left_out():
    instances = np.zeros((100, 100), np.uint8)
    instances[:9, :11] = 1
    instances[50:60, :10] = 2
    instances[20:40, :10] = 3
    things = [Thing('car', None), Thing('boat', None), Thing('tree', None)]
    scene = Scene(np.zeros((100, 100, 3), np.uint8), instances, instances, things)
    (found,) = describe_things(scene)
    assert (found['category_id'], found['bbox']) == (9, [0, 50, 10, 10])


FIGURE = Figure(
    head=(0.5, 0.2),
    head_axes=(0.07, 0.08),
    arms=(((0.4, 0.3), (0.35, 0.5)), ((0.6, 0.3), (0.65, 0.5))),
    legs=(((0.46, 0.5), (0.44, 0.9)), ((0.54, 0.5), (0.56, 0.9))),
    hand=0.02,
    foot=0.03,
)


def test_left_is_the_persons_own():
    from mmpose.datasets import CocoWholeBodyDataset

    meta = CocoWholeBodyDataset(lazy_init=True).metainfo
    found = locate_keypoints(FIGURE)
    assert {key: len(points) for key, points in found.items()} == PARTS
    points = np.concatenate([found[part] for part in PARTS])
    mirrored = points * (-1, 1) + (2 * FIGURE.head[0], 0)
    np.testing.assert_allclose(mirrored, points[meta['flip_indices']])
    names = [meta['keypoint_id2name'][number] for number in range(133)]
    assert tuple(names[:17]) == BODY_NAMES
    for name, (x, _) in zip(names, points, strict=True):
        if name.startswith('left'):
            assert x > 0.5, name
    # The viewer's left is the person's right, where a face's points begin.
    x, y = found['face_kpts'].T
    assert (np.diff(x[:17]) > 0).all() and (x[36:42] < 0.5).all()
    assert x[36] < x[39] and y[37] < y[41]
    assert x[48] < x[54] and y[51] < y[57] and x[60] < x[64] and y[62] < y[66]
    # Palms to the thighs: the thumb and the big toe are on the inner side.
    inner = abs(points[:, 0] - 0.5)
    assert inner[names.index('left_thumb4')] < inner[names.index('left_pinky_finger1')]
    assert inner[names.index('left_big_toe')] < inner[names.index('left_small_toe')]
    links = {tuple(sorted(link)) for link in meta['skeleton_links'] if max(link) < 17}
    assert {tuple(sorted((a - 1, b - 1))) for a, b in BODY_SKELETON} == links


def test_visibility_of_keypoints():
    instances = np.zeros((50, 50), np.uint8)
    instances[:30] = 2
    found = describe_person(FIGURE, instances, 2)
    assert found['num_keypoints'] == 17
    # The eyes lie at the head's centre, and pixels are counted from their centres.
    np.testing.assert_allclose(triplets(found, 'keypoints')[1:3, 1], 0.2 * 50 - 0.5)
    assert all(set(found[part][2::3]) == {2} for part in PARTS)
    assert found['face_valid'] and found['lefthand_valid'] and found['foot_valid']
    x, y, width, height = found['face_box']
    face = triplets(found, 'face_kpts')
    np.testing.assert_allclose((x, y), face[:, :2].min(0))
    np.testing.assert_allclose((x + width, y + height), face[:, :2].max(0), atol=0.011)

    # Only what is in front hides; what is behind and the background do not.
    assert describe_person(FIGURE, instances, 3) == found
    hidden = describe_person(FIGURE, instances, 1)
    for part in PARTS:
        before, after = triplets(found, part), triplets(hidden, part)
        np.testing.assert_array_equal(before[:, :2], after[:, :2])
        np.testing.assert_array_equal(after[:, 2], np.where(after[:, 1] < 29.5, 1, 2))
    assert hidden['num_keypoints'] == 17
    assert not hidden['face_valid'] and hidden['foot_valid']

    # Moved up by 0.3: the head lies outside, the shoulders at the very top.
    arms = tuple(tuple((x, y - 0.3) for x, y in arm) for arm in FIGURE.arms)
    outside = FIGURE._replace(head=(0.5, -0.1), arms=arms)
    found = describe_person(outside, instances, 2)
    assert not any(found['face_kpts']) and found['face_box'] == [0, 0, 0, 0]
    assert not found['face_valid'] and found['num_keypoints'] == 12
    assert triplets(found, 'keypoints')[5, 2] == 2


def test_keypoints_lie_on_their_person(coco):
    flags = set()
    for person in coco['coco_wholebody_val_v1.0']['annotations']:
        for part, count in PARTS.items():
            assert triplets(person, part).shape == (count, 3)
        points = triplets(person)
        flags |= set(points[:, 2])
        body = points[:17]
        assert person['num_keypoints'] == (body[:, 2] > 0).sum() > 0
        assert not points[points[:, 2] == 0].any()
        mask = np.pad(decode(person), 1)
        near = np.stack(
            [np.roll(mask, (a, b), (0, 1)) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        ).any(0)
        x, y, width, height = person['bbox']
        for px, py, flag in points:
            if flag == 2:
                assert near[round(py) + 1, round(px) + 1]
                assert x - 1 <= px <= x + width and y - 1 <= py <= y + height
        # Head above the hips, above the ankles.
        if (body[[0, 11, 15], 2] > 0).all():
            assert body[0, 1] < body[11, 1] < body[15, 1]
        if (body[[5, 6], 2] > 0).all():
            assert body[5, 0] > body[6, 0]
    assert flags >= {0, 2}


def test_detections_are_near_their_persons(coco):
    detections = coco['COCO_val2017_detections_AP_H_56_person']
    persons = coco['coco_wholebody_val_v1.0']['annotations']
    for found, person in zip(detections, persons, strict=True):
        assert (found['category_id'], found['image_id']) == (1, person['image_id'])
        assert 0.5 < found['score'] < 1
        assert found['bbox'] != person['bbox']
        size = max(person['bbox'][2:])
        np.testing.assert_allclose(found['bbox'], person['bbox'], atol=0.1 * size)
        x, y, width, height = found['bbox']
        assert min(x, y) >= 0 and max(x + width, y + height) <= SIZE + 0.01
    assert len({found['score'] for found in detections}) > 1


def test_stock_mmdet_reads_coco(place, coco, monkeypatch):
    monkeypatch.chdir(place)
    for loader, count in (('train', NUM_TRAIN), ('val', NUM_VAL)):
        data = stock_dataset('mmdet', '_base_/datasets/coco_instance.py', loader)
        assert len(data) == count
        annotations = coco[f'instances_{loader}2017']['annotations']
        for index in range(count):
            item = data[index]
            truth = item['data_samples'].gt_instances
            number = item['data_samples'].img_id
            ours = [one for one in annotations if one['image_id'] == number]
            names = [data.metainfo['classes'][label] for label in truth.labels]
            assert names and [CATEGORIES[name] for name in names] == [
                one['category_id'] for one in ours
            ]
            scale = item['inputs'].shape[1] / SIZE
            areas = truth.masks.masks.sum((1, 2))
            if loader == 'val':  # its pipeline leaves the annotations' size alone
                np.testing.assert_array_equal(areas, [one['area'] for one in ours])
            else:
                ours = [one['area'] * scale**2 for one in ours]
                np.testing.assert_allclose(areas, ours, rtol=0.02)


def mmdet_scores(data, shift):
    """Results of stock ``CocoMetric`` for the truth, moved right by ``shift``."""
    import torch
    from mmdet.evaluation import CocoMetric

    file = 'data/coco/annotations/instances_val2017.json'
    metric = CocoMetric(file, ['bbox', 'segm'])
    metric.dataset_meta = data.metainfo
    for index in range(len(data)):
        sample = data[index]['data_samples']
        truth = sample.gt_instances
        boxes = truth.bboxes.tensor + torch.tensor((shift, 0, shift, 0))
        masks = torch.from_numpy(truth.masks.masks).roll(shift, 2).bool()
        scores = torch.ones(len(boxes))
        found = dict(bboxes=boxes, labels=truth.labels, scores=scores, masks=masks)
        image = dict(img_id=sample.img_id, ori_shape=sample.ori_shape)
        metric.process({}, [dict(image, pred_instances=found)])
    return metric.evaluate(len(data))


def test_the_truth_scores_full_marks_in_mmdet(place, monkeypatch):
    monkeypatch.chdir(place)
    data = stock_dataset('mmdet', '_base_/datasets/coco_instance.py', 'val')
    scores = mmdet_scores(data, 0)
    assert scores['coco/bbox_mAP'] == scores['coco/segm_mAP'] == 1
    scores = mmdet_scores(data, 8)
    assert max(scores['coco/bbox_mAP'], scores['coco/segm_mAP']) < 0.9


def test_stock_mmpose_reads_whole_bodies(place, coco, monkeypatch):
    monkeypatch.chdir(place)
    persons = coco['coco_wholebody_train_v1.0']['annotations']
    data = stock_dataset('mmpose', WHOLE_BODY, 'train')
    assert len(data) == len(persons) >= NUM_TRAIN
    for index, person in enumerate(persons):
        info = data.get_data_info(index)
        assert info['id'] == person['id']
        points = triplets(person)
        np.testing.assert_allclose(info['keypoints'][0], points[:, :2])
        np.testing.assert_array_equal(info['keypoints_visible'][0], points[:, 2] > 0)
        item = data[index]
        assert item['inputs'].shape == (3, 256, 192)
        assert item['data_samples'].gt_fields.heatmaps.shape == (133, 64, 48)
    # By default the detected boxes are evaluated.
    detections = coco['COCO_val2017_detections_AP_H_56_person']
    data = stock_dataset('mmpose', WHOLE_BODY, 'val')
    assert len(data) == len(detections) >= NUM_VAL
    x, y, width, height = detections[0]['bbox']
    box = data.get_data_info(0)['bbox'][0]
    np.testing.assert_allclose(box, (x, y, x + width, y + height), rtol=1e-5)


def mmpose_scores(data, shift):
    """Results of stock ``CocoWholeBodyMetric`` for the truth, moved right."""
    from mmpose.evaluation import CocoWholeBodyMetric

    metric = CocoWholeBodyMetric('data/coco/annotations/coco_wholebody_val_v1.0.json')
    metric.dataset_meta = data.metainfo
    for index in range(len(data)):
        info = data.get_data_info(index)
        found = dict(keypoints=info['keypoints'] + (shift, 0))
        found['keypoint_scores'] = np.ones((1, 133))
        sample = dict(id=info['id'], img_id=info['img_id'], gt_instances={})
        metric.process({}, [dict(sample, pred_instances=found)])
    return metric.evaluate(len(data))


def test_the_truth_scores_full_marks_in_mmpose(place, monkeypatch):
    monkeypatch.chdir(place)
    data = stock_dataset('mmpose', WHOLE_BODY, 'val', bbox_file=None)
    assert mmpose_scores(data, 0)['coco-wholebody/AP'] == pytest.approx(1)
    assert mmpose_scores(data, 8)['coco-wholebody/AP'] < 0.5
