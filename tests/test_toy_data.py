"""Toy data in the layouts of real data sets, as the stock toolboxes see them."""

import re
import subprocess
import sys
from pathlib import Path

import make_toy_data as tool
import numpy as np
import pytest
from make_toy_data import ADE_CLASSES, TASKS, make_toy_data
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from toy_scene import draw_scene

import clustr_mm  # noqa: F401  lets mmseg import with mmcv-lite

ROOT = Path(__file__).parents[1]
SMALL = dict(num_train=3, num_val=2, size=64)


def read(root):
    """All files but the record of the parameters."""
    files = [file for file in root.rglob('*') if file.is_file()]
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in files
        if file.name != 'toy_data.json'
    }


def test_ade20k_as_mmseg_reads_it(tmp_path):
    root, drawn = make_toy_data(out=tmp_path, **SMALL)
    assert drawn and root == tmp_path / 'ADEChallengeData2016'
    names = [f'training/ADE_train_{number:08d}' for number in (1, 2, 3)]
    names += [f'validation/ADE_val_{number:08d}' for number in (1, 2)]
    expected = {f'images/{name}.jpg': 'RGB' for name in names}
    expected |= {f'annotations/{name}.png': 'L' for name in names}
    assert set(read(root)) == set(expected)
    for name, mode in expected.items():
        image = Image.open(root / name)
        assert (image.mode, image.size) == (mode, (64, 64))

    config = Config.fromfile(ROOT / 'configs/mmseg/fpn_clustr-t_toy-ade20k.py')
    init_default_scope('mmseg')
    for loader, count in (('train', 3), ('val', 2)):
        settings = config[f'{loader}_dataloader'].dataset
        dataset = DATASETS.build({**settings, 'data_root': str(root)})
        assert len(dataset) == count
        # reduce_zero_label: 1..150 in the file, 0..149 for the model.
        seen = dataset[0]['data_samples'].gt_sem_seg.data.unique().tolist()
        found = {dataset.metainfo['classes'][label] for label in seen}
        assert found <= set(ADE_CLASSES) and 'sky' in found
    for name, (label, colour) in ADE_CLASSES.items():
        assert dataset.metainfo['classes'][label - 1] == name
        assert tuple(dataset.metainfo['palette'][label - 1]) == colour


def test_labels_agree_with_the_pictures():
    pieces = {label: [] for label, _ in ADE_CLASSES.values()}
    inside, borders = [], []
    for index in range(24):
        scene = draw_scene(np.random.default_rng(index), 64)
        for label in np.unique(scene.labels):
            pieces[label].append(scene.image[scene.labels == label])
        for number, (name, keypoints) in enumerate(scene.things, 1):
            shown = np.unique(scene.labels[scene.instances == number]).tolist()
            assert shown in ([], [ADE_CLASSES[name][0]])
            assert (keypoints is not None) == (name == 'person')
        change = abs(np.diff(scene.image.astype(int), axis=1)).sum(-1)
        border = np.diff(scene.instances.astype(int), axis=1) != 0
        borders += change[border].tolist()
        inside += change[~border].tolist()
    # Where a thing ends, a picture changes more than elsewhere.
    assert np.median(borders) > 2 * np.median(inside)
    for label, pixels in pieces.items():
        assert sum(map(len, pixels)) > 0.005 * 24 * 64**2, label
        # Not flat within an image, and of more than one colour over all.
        assert np.median([piece.std(axis=0).mean() for piece in pixels]) > 5, label
        assert np.std([piece.mean(axis=0) for piece in pixels], axis=0).max() > 5


@pytest.mark.parametrize('task', TASKS)
def test_seed_and_number_decide_an_image(tmp_path, task):
    first, _ = make_toy_data(task, tmp_path / 'a', **SMALL)
    again, _ = make_toy_data(task, tmp_path / 'b', **SMALL)
    other, _ = make_toy_data(task, tmp_path / 'c', **SMALL, seed=1)
    assert read(first) == read(again) and len(read(first)) >= 7
    # Only the lists of ImageNet's labels do not depend on what is drawn.
    common = set(read(first).items()) & set(read(other).items())
    assert {Path(name).suffix for name, _ in common} <= {'.txt'}

    more, _ = make_toy_data(task, tmp_path / 'd', num_train=4, num_val=3, size=64)
    few, more = read(first), read(more)
    images = [name for name in more if Path(name).suffix in ('.jpg', '.JPEG')]
    assert len({more[name] for name in images}) == len(images) == 7
    kept = [name for name in few if name in images]
    assert len(kept) == 5 and all(few[name] == more[name] for name in kept)


def test_imagenet_as_mmpretrain_reads_it(tmp_path, monkeypatch):
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    root, _ = make_toy_data('imagenet', tmp_path / 'data', 7, 4, 64)
    monkeypatch.chdir(tmp_path)
    init_default_scope('mmpretrain')
    config = get_config('mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py')
    names = {'ball': 'soccer ball', 'car': 'sports car', 'boat': 'yawl'}
    for loader, count in (('train', 7), ('val', 4)):
        data = DATASETS.build(config[f'{loader}_dataloader'].dataset)
        assert len(data) == count and len(data.metainfo['classes']) == 1000
        labels = [data.get_data_info(index)['gt_label'] for index in range(count)]
        shares = np.bincount(labels)[np.unique(labels)]
        assert len(shares) == 3 and np.ptp(shares) <= 1
        listed = (root / f'meta/{loader}.txt').read_text().splitlines()
        assert len(listed) == count
        for line in listed:
            name, number = line.split()
            image = Image.open(root / loader / name)
            assert (image.format, image.size) == ('JPEG', (64, 64))
            index, thing = tool.IMAGENET_CLASSES[Path(name).parent.name]
            assert index == int(number) and int(number) in labels
            assert IMAGENET_CATEGORIES[index].split(', ')[0] == names[thing]
        assert data[0]['data_samples'].gt_label.item() == labels[0]
    for thing in names:
        scene = draw_scene(np.random.default_rng(0), 64, thing)
        assert [name for name, _ in scene.things] == [thing]
        assert (scene.instances == 1).mean() > 0.03


def test_same_parameters_are_reused(tmp_path, monkeypatch):
    root, _ = make_toy_data(out=tmp_path, **SMALL)
    (root / 'touched').touch()
    assert make_toy_data(out=tmp_path, **SMALL) == (root, False)
    assert (root / 'touched').exists()
    assert make_toy_data(out=tmp_path, **{**SMALL, 'num_val': 1}) == (root, True)
    assert len(list((root / 'annotations/validation').iterdir())) == 1
    monkeypatch.setattr(tool, 'VERSION', -1)
    assert make_toy_data(out=tmp_path, **{**SMALL, 'num_val': 1}) == (root, True)


def test_interrupted_run_leaves_what_was_there(tmp_path, monkeypatch):
    def interrupt(*args):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append(draw_scene(*args))
        return drawn[-1]

    drawn = []
    monkeypatch.setattr(tool, 'draw_scene', interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_toy_data(out=tmp_path, **SMALL)
    assert len(drawn) == 4 and list(tmp_path.iterdir()) == []

    monkeypatch.undo()
    root, _ = make_toy_data(out=tmp_path, **SMALL)
    before = read(root)
    monkeypatch.setattr(tool, 'draw_scene', interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_toy_data(out=tmp_path, **SMALL, seed=1)
    assert list(tmp_path.iterdir()) == [root] and read(root) == before
    (tmp_path / 'other').mkdir()
    assert root.stat().st_mode == (tmp_path / 'other').stat().st_mode


def test_real_data_is_not_overwritten(tmp_path):
    real = tmp_path / 'ADEChallengeData2016/images/training/ADE_train_00000001.jpg'
    real.parent.mkdir(parents=True)
    real.write_bytes(b'real')
    with pytest.raises(FileExistsError, match='is no toy data set'):
        make_toy_data(out=tmp_path, **SMALL)
    assert real.read_bytes() == b'real'


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        (dict(task='coco2'), "task must be one of ade20k, coco, imagenet, got 'coco2'"),
        (dict(num_train=0), 'num_train must be a whole number from 1 to 99999, got 0'),
        (
            dict(num_val=True),
            'num_val must be a whole number from 1 to 99999, got True',
        ),
        (dict(size=63), 'size must be a whole number from 64 to 2048, got 63'),
        (dict(size=96.5), 'size must be a whole number from 64 to 2048, got 96.5'),
        (dict(seed=-1), 'seed must be a whole number from 0 to 4294967295, got -1'),
    ],
)
def test_bad_arguments(tmp_path, argument, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_toy_data(out=tmp_path, **{**SMALL, **argument})
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, monkeypatch):
    line = [sys.executable, ROOT / 'tools/dataset_converters/make_toy_data.py']
    line += ['--out', 'toy', '--num-train', '3', '--num-val', '2', '--size', '64']
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout == 'drew toy/ADEChallengeData2016\n'
    again = dict(SMALL, out=tmp_path / 'toy')
    assert make_toy_data(**again) == (tmp_path / 'toy/ADEChallengeData2016', False)

    # A text as the code goes to stderr, with exit status 1.
    monkeypatch.setattr(sys, 'argv', ['make_toy_data.py', '--seed', '-1'])
    with pytest.raises(SystemExit, match=r'^make_toy_data.py: seed must be .*got -1$'):
        tool.main()
