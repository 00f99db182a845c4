import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clustr_mm import toy_data
from clustr_mm.toy_data import ADE_CLASSES, draw_scene, make_toy_data
from clustr_mm.toy_data.imagenet import IMAGENET_CLASSES

ROOT = Path(__file__).parents[1]
SMALL = dict(num_train=3, num_val=2, size=64)
FOLDERS = dict(ade20k='ADEChallengeData2016', coco='coco', imagenet='imagenet')


def read(root):
    """All files but the record of the parameters."""
    files = [file for file in sorted(root.rglob('*')) if file.is_file()]
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in files
        if file.name != 'toy_data.json'
    }


def labels_of(root):
    return [np.array(Image.open(file)) for file in sorted(root.rglob('*.png'))]


def test_layout_and_format(tmp_path):
    root, drawn = make_toy_data(out=tmp_path, **SMALL)
    assert drawn and root == tmp_path / 'ADEChallengeData2016'
    assert set(read(root)) == {
        'images/training/ADE_train_00000001.jpg',
        'images/training/ADE_train_00000002.jpg',
        'images/training/ADE_train_00000003.jpg',
        'images/validation/ADE_val_00000001.jpg',
        'images/validation/ADE_val_00000002.jpg',
        'annotations/training/ADE_train_00000001.png',
        'annotations/training/ADE_train_00000002.png',
        'annotations/training/ADE_train_00000003.png',
        'annotations/validation/ADE_val_00000001.png',
        'annotations/validation/ADE_val_00000002.png',
    }
    allowed = {label for label, _ in ADE_CLASSES.values()}
    for file in root.rglob('*.png'):
        label = Image.open(file)
        assert (label.mode, label.size) == ('L', (64, 64))
        assert set(np.unique(label)) <= allowed
    for file in root.rglob('*.jpg'):
        image = Image.open(file)
        assert (image.mode, image.size) == ('RGB', (64, 64))


def test_stock_dataset_reads_it(tmp_path):
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    root, _ = make_toy_data(out=tmp_path, **SMALL)
    config = Config.fromfile(ROOT / 'configs/mmseg/fpn_clustr-t_toy-ade20k.py')
    init_default_scope('mmseg')
    for loader, count in (('train', 3), ('val', 2)):
        settings = config[f'{loader}_dataloader'].dataset
        dataset = DATASETS.build({**settings, 'data_root': str(root)})
        assert len(dataset) == count
        item = dataset[0]
        # reduce_zero_label: 1..150 in the file, 0..149 for the model.
        seen = item['data_samples'].gt_sem_seg.data.unique().tolist()
        names = {dataset.metainfo['classes'][label] for label in seen}
        assert names <= set(ADE_CLASSES) and 'sky' in names
        assert item['inputs'].shape == (3, 64, 64)


def test_classes_are_those_of_ade20k():
    from mmseg.datasets import ADE20KDataset

    import clustr_mm  # noqa: F401  lets mmseg import with mmcv-lite

    meta = ADE20KDataset.METAINFO
    for name, (label, colour) in ADE_CLASSES.items():
        assert 1 <= label <= 150
        assert meta['classes'][label - 1] == name
        assert tuple(meta['palette'][label - 1]) == colour


def test_every_class_is_drawn_and_textured():
    values = {label: [] for label, _ in ADE_CLASSES.values()}
    for index in range(24):
        image, labels, *_ = draw_scene(np.random.default_rng(index), 64)
        assert image.shape == (64, 64, 3) and labels.shape == (64, 64)
        assert image.dtype == labels.dtype == np.uint8
        assert len(np.unique(labels)) >= 3
        for label in np.unique(labels):
            values[label].append(image[labels == label])
    for label, pixels in values.items():
        assert sum(map(len, pixels)) > 0.005 * 24 * 64**2, label
        # Not flat within an image, and of more than one colour over all.
        assert np.median([piece.std(axis=0).mean() for piece in pixels]) > 5, label
        assert np.std([piece.mean(axis=0) for piece in pixels], axis=0).max() > 5


@pytest.mark.parametrize('task', toy_data.TASKS)
def test_seed_decides_the_bytes(tmp_path, task):
    first, _ = make_toy_data(task, tmp_path / 'a', **SMALL)
    again, _ = make_toy_data(task, tmp_path / 'b', **SMALL)
    other, _ = make_toy_data(task, tmp_path / 'c', **SMALL, seed=1)
    assert first == tmp_path / 'a' / FOLDERS[task]
    assert read(first) == read(again) and len(read(first)) >= 7
    # Only the lists of ImageNet's labels do not depend on what is drawn.
    common = set(read(first).items()) & set(read(other).items())
    assert {Path(name).suffix for name, _ in common} <= {'.txt'}


@pytest.mark.parametrize('task', toy_data.TASKS)
def test_splits_are_disjoint_and_grow(tmp_path, task):
    few, _ = make_toy_data(task, tmp_path / 'few', **SMALL)
    more, _ = make_toy_data(task, tmp_path / 'more', num_train=4, num_val=3, size=64)
    few, more = read(few), read(more)
    images = {name for name in more if Path(name).suffix in ('.jpg', '.JPEG')}
    assert len({more[name] for name in images}) == len(images) == 7
    kept = {name for name in few if Path(name).suffix not in ('.json', '.txt')}
    assert len(kept) >= 5 and all(few[name] == more[name] for name in kept)


def test_same_parameters_are_reused(tmp_path, monkeypatch):
    root, _ = make_toy_data(out=tmp_path, **SMALL)
    (root / 'touched').touch()
    assert make_toy_data(out=tmp_path, **SMALL) == (root, False)
    assert (root / 'touched').exists()

    record = json.loads((root / 'toy_data.json').read_text())
    assert record.items() >= dict(SMALL, task='ade20k', seed=0).items()
    for change in (dict(seed=1), dict(num_val=1)):
        assert make_toy_data(out=tmp_path, **{**SMALL, **change}) == (root, True)
    assert len(labels_of(root / 'annotations/validation')) == 1
    monkeypatch.setattr(toy_data, '_VERSION', -1)
    assert make_toy_data(out=tmp_path, **{**SMALL, 'num_val': 1}) == (root, True)


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append(draw_scene(*args))
        return drawn[-1]

    drawn = []
    monkeypatch.setattr(toy_data.ade20k, 'draw_scene', interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_toy_data(out=tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []

    # What stands beside it may be somebody's, or another run's.
    other = tmp_path / 'ADEChallengeData2016.partial/images'
    other.mkdir(parents=True)
    monkeypatch.undo()
    root, _ = make_toy_data(out=tmp_path, **SMALL)
    assert sorted(tmp_path.iterdir()) == [root, other.parent] and other.is_dir()
    assert root.stat().st_mode == other.stat().st_mode


def test_interrupted_redraw_keeps_the_old_set(tmp_path, monkeypatch):
    root, _ = make_toy_data(out=tmp_path, **SMALL)
    before = read(root)
    monkeypatch.setattr(toy_data.ade20k, 'draw_scene', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_toy_data(out=tmp_path, **SMALL, seed=1)
    assert list(tmp_path.iterdir()) == [root] and read(root) == before


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
        (dict(num_train=0), 'num_train must be from 1 to 99999, got 0'),
        (dict(num_val=-1), 'num_val must be from 1 to 99999, got -1'),
        (dict(num_val=True), 'num_val must be a whole number, got True'),
        (dict(size=63), 'size must be from 64 to 2048, got 63'),
        (dict(size=96.5), 'size must be a whole number, got 96.5'),
        (dict(seed=-1), 'seed must be from 0 to 4294967295, got -1'),
    ],
)
def test_bad_arguments(tmp_path, argument, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_toy_data(out=tmp_path, **{**SMALL, **argument})
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, monkeypatch, capsys):
    tool = str(ROOT / 'tools/make_toy_data.py')
    arguments = ['--out', 'toy', '--num-train', '3', '--num-val', '2', '--size', '64']
    line = [sys.executable, tool, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout == 'drew toy/ADEChallengeData2016\n'
    expected, _ = make_toy_data(out=tmp_path / 'expected', **SMALL)
    assert read(tmp_path / 'toy/ADEChallengeData2016') == read(expected)

    monkeypatch.chdir(tmp_path)
    for task in ('coco', 'imagenet'):
        monkeypatch.setattr(sys, 'argv', [tool, '--task', task, *arguments])
        runpy.run_path(tool, run_name='__main__')
        assert capsys.readouterr().out == f'drew toy/{task}\n'
        expected, _ = make_toy_data(task, tmp_path / 'expected', **SMALL)
        assert read(tmp_path / 'toy' / task) == read(expected)

    monkeypatch.setattr(sys, 'argv', [tool, '--seed', '-1'])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(tool, run_name='__main__')
    # A text as the code goes to stderr, with exit status 1.
    message = 'make_toy_data.py: seed must be from 0 to 4294967295, got -1'
    assert error.value.code == message


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """A folder from where ``data/imagenet`` is found."""
    folder = tmp_path_factory.mktemp('imagenet')
    make_toy_data('imagenet', folder / 'data', 7, 11, 64)
    return folder


def test_imagenet_layout(imagenet):
    root = imagenet / 'data/imagenet'
    for split, count in (('train', 7), ('val', 11)):
        lines = (root / f'meta/{split}.txt').read_text().splitlines()
        assert len(lines) == count
        images = [line.split()[0] for line in lines]
        found = (root / split).rglob('*.JPEG')
        assert sorted(str(one.relative_to(root / split)) for one in found) == images
        per_class = [name.split('/')[0] for name in images]
        shares = [per_class.count(wnid) for wnid in IMAGENET_CLASSES]
        assert sum(shares) == count and max(shares) - min(shares) <= 1
        for name in images:
            image = Image.open(root / split / name)
            form = (image.format, image.mode, image.size)
            assert form == ('JPEG', 'RGB', (64, 64))
    assert 'n04285008/n04285008_1.JPEG 817' in (
        (root / 'meta/train.txt').read_text().splitlines()
    )
    assert len(list((root / 'val').iterdir())) == 5


def test_imagenet_classes_are_mmpretrains():
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    ours = {wnid: (kind.name, kind.index) for wnid, kind in IMAGENET_CLASSES.items()}
    assert ours == {
        'n09193705': ('alp', 970),
        'n02793495': ('barn', 425),
        'n02981792': ('catamaran', 484),
        'n04254680': ('soccer ball', 805),
        'n04285008': ('sports car', 817),
    }
    for kind in IMAGENET_CLASSES.values():
        assert IMAGENET_CATEGORIES[kind.index].split(', ')[0] == kind.name


def test_stock_mmpretrain_reads_imagenet(imagenet, monkeypatch):
    from mmengine.hub import get_config
    from mmengine.registry import DATASETS, init_default_scope

    monkeypatch.chdir(imagenet)
    init_default_scope('mmpretrain')
    config = get_config('mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py')
    for loader, count in (('train', 7), ('val', 11)):
        data = DATASETS.build(config[f'{loader}_dataloader'].dataset)
        assert len(data) == count and len(data.metainfo['classes']) == 1000
        for index in range(count):
            info = data.get_data_info(index)
            wnid = Path(info['img_path']).parent.name
            assert info['gt_label'] == IMAGENET_CLASSES[wnid].index
        item = data[0]
        assert item['inputs'].shape == (3, 224, 224)
        assert item['data_samples'].gt_label.item() == data.get_data_info(0)['gt_label']
