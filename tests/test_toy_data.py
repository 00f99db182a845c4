"""Toy data in the layouts of ADE20K and ImageNet, as the stock toolboxes see them."""

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
    assert len(read(root)) == 10
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
        change = abs(np.diff(scene.image.astype(int), axis=1)).sum(-1)
        border = np.diff(scene.labels.astype(int), axis=1) != 0
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
    few, _ = make_toy_data(task, tmp_path / 'a', **SMALL)
    more, _ = make_toy_data(task, tmp_path / 'b', num_train=4, num_val=3, size=64)
    other, _ = make_toy_data(task, tmp_path / 'c', **SMALL, seed=1)
    few, more, other = (
        {n: file for n, file in read(root).items() if n.endswith(('.jpg', '.JPEG'))}
        for root in (few, more, other)
    )
    assert len(few) == 5 and len(set(more.values())) == 7
    assert few.items() <= more.items()
    assert not set(few.items()) & set(other.items())


def test_imagenet_as_mmpretrain_reads_it(tmp_path, monkeypatch):
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    make_toy_data('imagenet', tmp_path / 'data', 7, 4, 64)
    monkeypatch.chdir(tmp_path)
    init_default_scope('mmpretrain')
    config = get_config('mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py')
    for loader, count in (('train', 7), ('val', 4)):
        data = DATASETS.build(config[f'{loader}_dataloader'].dataset)
        assert len(data) == count and data[0]['inputs'].shape[0] == 3
        names = {IMAGENET_CATEGORIES[label] for label in data.get_gt_labels()}
        assert names == {'soccer ball', 'sports car, sport car', 'yawl'}
        listed = Path(f'data/imagenet/meta/{loader}.txt').read_text().splitlines()
        for index, line in enumerate(listed):
            assert line.endswith(f'.JPEG {data.get_gt_labels()[index]}')
    for thing in ('ball', 'car', 'boat'):
        scene = draw_scene(np.random.default_rng(0), 64, thing)
        assert (scene.labels == ADE_CLASSES[thing][0]).mean() > 0.03


def test_interrupted_run_leaves_what_was_there(tmp_path, monkeypatch):
    def interrupt(*args):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append(draw_scene(*args))
        return drawn[-1]

    drawn = []
    root, _ = make_toy_data(out=tmp_path, **SMALL)
    before = read(root)
    monkeypatch.setattr(tool, 'draw_scene', interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_toy_data(out=tmp_path, **SMALL, seed=1)
    assert len(drawn) == 4
    assert list(tmp_path.iterdir()) == [root] and read(root) == before
    (tmp_path / 'other').mkdir()
    assert root.stat().st_mode == (tmp_path / 'other').stat().st_mode


def test_real_data_is_not_overwritten(tmp_path):
    real = tmp_path / 'ADEChallengeData2016/images/training/ADE_train_00000001.jpg'
    real.parent.mkdir(parents=True)
    Image.new('RGB', (1, 1)).save(real)
    before = real.read_bytes()
    with pytest.raises(FileExistsError, match='is no toy data set'):
        make_toy_data(out=tmp_path, **SMALL)
    assert real.read_bytes() == before


def test_command_line(tmp_path):
    """The same data are not drawn again; an error takes one line."""

    def run(*options):
        line = [sys.executable, ROOT / 'tools/dataset_converters/make_toy_data.py']
        line += ['--out', 'toy', '--num-train', '1', '--num-val', '1', '--size', '64']
        done = subprocess.run(
            [*line, *options], capture_output=True, text=True, cwd=tmp_path
        )
        return done.returncode, done.stdout + done.stderr

    assert run() == (0, 'drew toy/ADEChallengeData2016\n')
    assert run() == (0, 'found toy/ADEChallengeData2016\n')
    assert run('--seed', '1') == (0, 'drew toy/ADEChallengeData2016\n')
    message = 'make_toy_data.py: size must be at least 64, got 63\n'
    assert run('--size', '63') == (1, message)
