"""The converter of CamVid, and the configs that train on what it writes."""

from pathlib import Path

import camvid
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image

CONFIGS = sorted(
    (Path(__file__).resolve().parents[1] / 'configs/mmseg/camvid').glob('*.py')
)


def draw(source):
    """Two pictures a split, as in the repository; each label is a stripe."""
    labels = np.arange(360)[:, None].repeat(480, 1) // 30
    for split in camvid.SPLITS:
        for folder in (split, f'{split}annot'):
            (source / folder).mkdir(parents=True)
        for name in ('0001TP_1.png', '0006R0_2.png'):
            Image.fromarray((labels * 20).astype(np.uint8)).convert('RGB').save(
                source / split / name
            )
            Image.fromarray(labels.astype(np.uint8)).save(
                source / f'{split}annot' / name
            )


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp('camvid')
    draw(folder / 'CamVid')
    assert camvid.convert(folder / 'CamVid', folder / 'data/camvid') == 6
    return folder / 'data/camvid'


def test_what_is_written(converted):
    labels = np.array(Image.open(converted / 'annotations/test/0001TP_1.png'))
    assert labels.shape == (180, 240)
    assert labels[::15, 0].tolist() == [*range(11), 255]
    assert Image.open(converted / 'images/val/0006R0_2.png').size == (240, 180)
    assert (converted / 'fit.txt').read_text() == '0001TP_1\n'
    assert (converted / 'held_out.txt').read_text() == '0006R0_2\n'


def test_errors_leave_nothing(tmp_path, converted):
    with pytest.raises(FileExistsError, match='choose another folder'):
        camvid.convert(tmp_path / 'CamVid', converted)
    out = tmp_path / 'out/camvid'
    with pytest.raises(ValueError, match=r'no pictures .*CamVid/train/\*.png'):
        camvid.convert(tmp_path / 'CamVid', out)
    draw(tmp_path / 'CamVid')
    wrong = tmp_path / 'CamVid/testannot/0006R0_2.png'
    Image.fromarray(np.full((360, 480), 12, np.uint8)).save(wrong)
    with pytest.raises(ValueError, match='from 0 to 11 .*, got 12 in .*0006R0_2'):
        camvid.convert(tmp_path / 'CamVid', out)
    wrong.unlink()
    with pytest.raises(ValueError, match='no annotation .*0006R0_2'):
        camvid.convert(tmp_path / 'CamVid', out)
    assert not list((tmp_path / 'out').iterdir())


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configs(converted, path):
    """A loss on the training pictures, a prediction of a test picture's size."""
    config = Config.fromfile(path)
    for name in config.custom_imports.imports:
        __import__(name)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    train, test = (
        DATASETS.build({**part.dataset, 'data_root': str(converted)})
        for part in (config.train_dataloader, config.test_dataloader)
    )
    batch = model.data_preprocessor(pseudo_collate([train[0], train[1]]), True)
    loss = model(**batch, mode='loss')['decode.loss_ce']
    assert 1 < float(loss) < 4  # of 11 classes at random, 2.4
    model.eval()
    with torch.no_grad():
        (sample,) = model.test_step(pseudo_collate([test[0]]))
    assert sample.pred_sem_seg.shape == (180, 240)
