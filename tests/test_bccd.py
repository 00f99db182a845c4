"""The configs that train on BCCD, whose folder MMDetection reads as it is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image

CONFIGS = sorted(
    (Path(__file__).resolve().parents[1] / 'configs/mmdet/bccd').glob('*.py')
)
CELL = (
    '<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>121</ymin>'
    '<xmax>{}</xmax><ymax>221</ymax></bndbox></object>'
)


@pytest.fixture(scope='module')
def bccd(tmp_path_factory):
    """A picture of 640 x 480 with a cell of each class; in training one has no area."""
    folder = tmp_path_factory.mktemp('bccd')
    for name in ('Annotations', 'ImageSets/Main', 'JPEGImages'):
        (folder / name).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    cells = [('RBC', 1, 101), ('WBC', 201, 301), ('Platelets', 401, 501)]
    size = '<size><width>640</width><height>480</height></size>'
    for split, more in dict(trainval=[('RBC', 601, 601)], test=[]).items():
        (folder / f'ImageSets/Main/{split}.txt').write_text(f'{split}_1\n')
        Image.fromarray(pixels).save(folder / f'JPEGImages/{split}_1.jpg')
        objects = ''.join(CELL.format(*cell) for cell in cells + more)
        note = f'<a>{size}{objects}</a>'
        (folder / f'Annotations/{split}_1.xml').write_text(note)
    return folder


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configs(bccd, path):
    """A loss on boxes at half their size; for testing, boxes of the whole picture."""
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    model.init_weights()
    train, test = (
        DATASETS.build({**part.dataset, 'data_root': str(bccd)})
        for part in (config.train_dataloader, config.test_dataloader)
    )
    sample, whole = train[0], test[0]
    assert sample['inputs'].shape == whole['inputs'].shape == (3, 240, 320)
    for data, side in ((sample, 50), (whole, 100)):
        boxes = data['data_samples'].gt_instances
        corners = boxes.bboxes.tensor
        assert boxes.labels.tolist() == [0, 1, 2]
        assert (corners[:, 2:] - corners[:, :2]).tolist() == [[side, side]] * 3
    batch = model.data_preprocessor(pseudo_collate([sample, sample]), True)
    losses = model(**batch, mode='loss')
    assert all(0 < sum(part).item() < 4 for part in losses.values())
    model.eval()
    model.test_cfg.score_thr = model.bbox_head.test_cfg.score_thr = 0
    with torch.no_grad():
        (found,) = model.test_step(pseudo_collate([whole]))
    assert found.pred_instances.bboxes[:, 2].max() > 320  # of 640 pixels
