"""Configs and registries, as the stock toolboxes see them."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import clustr_mm
from clustr_mm.toy_data import make_toy_data

CONFIGS = Path(__file__).parents[1] / 'configs'
SEMANTIC_FPN = {
    variant: CONFIGS / f'mmseg/fpn_clustr-{variant}_4xb4-80k_ade20k-512x512.py'
    for variant in 'tsb'
}


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg', 'mmpose', 'mmpretrain'])
def test_every_toolbox_builds_the_backbone(toolbox):
    registry = importlib.import_module(f'{toolbox}.registry')
    model = registry.MODELS.build(dict(type='ClusTR', arch='tiny', out_indices=(0,)))
    assert isinstance(model, clustr_mm.ClusTR)


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*/*.py')), ids=lambda p: p.stem)
def test_every_config_builds_and_runs(path):
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model).eval()
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 64, 64))
    assert logits.shape == (1, 150, 16, 16)


@pytest.mark.parametrize('variant', 'tsb')
def test_semantic_fpn_recipe(variant):
    config = Config.fromfile(SEMANTIC_FPN[variant])
    backbone = MODELS.build(config.model.backbone)
    assert backbone.arch_settings is clustr_mm.ClusTR.arch_zoo[variant]
    assert config.model.neck.in_channels == list(backbone.arch_settings['embed_dims'])
    assert config.model.neck.out_channels == 256
    assert config.model.decode_head.channels == 128
    assert config.model.decode_head.num_classes == 150
    assert config.model.pretrained is None
    assert config.optim_wrapper.optimizer == dict(
        type='AdamW', lr=1e-4, weight_decay=1e-4
    )
    assert config.train_dataloader.batch_size * 4 == 16
    assert config.train_cfg.max_iters == 80000
    (schedule,) = config.param_scheduler
    assert (schedule.type, schedule.power, schedule.eta_min) == ('PolyLR', 0.9, 0)
    assert schedule.end == 80000
    data = config.train_dataloader.dataset
    assert (data.type, data.data_root) == (
        'ADE20KDataset',
        'data/ade/ADEChallengeData2016',
    )


def test_variants_are_short():
    for variant in 'sb':
        assert len(SEMANTIC_FPN[variant].read_text().splitlines()) < 15


def mim(command, cwd, *arguments):
    done = subprocess.run(
        [sys.executable, '-m', 'mim', command, 'mmseg', *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_mim_train_and_test(tmp_path):
    """The real config, from a foreign directory, on data in ADE20K's place."""
    root, _ = make_toy_data('ade20k', tmp_path / 'toy', 2, 2, 64, 0)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/ade').symlink_to(root.parent)
    config = SEMANTIC_FPN['t']
    shorter = [
        *('--cfg-options', 'train_cfg.max_iters=2', 'train_cfg.val_interval=9'),
        *('train_dataloader.batch_size=1', 'train_dataloader.num_workers=0'),
        *('train_dataloader.persistent_workers=False', 'test_dataloader.num_workers=0'),
        'test_dataloader.persistent_workers=False',
        'default_hooks.logger.interval=1',
    ]
    output = mim('train', tmp_path, config, *shorter)
    assert 'Iter(train) [2/2]' in output
    checkpoint = tmp_path / 'work_dirs' / config.stem / 'iter_2.pth'
    assert checkpoint.is_file()

    output = mim(
        'test', tmp_path, config, '--checkpoint', checkpoint,
        '--work-dir', tmp_path / 'tested', *shorter,
    )  # fmt: skip
    (metrics,) = (tmp_path / 'tested').glob('*/*.json')
    assert 0 <= json.loads(metrics.read_text())['mIoU'] <= 100

    # A checkpoint of something else ends in the counted error, not in numbers.
    other = tmp_path / 'other.pth'
    torch.save(dict(state_dict={'backbone.conv1.weight': torch.zeros(1)}), other)
    failed = subprocess.run(
        [sys.executable, '-m', 'mim', 'test', 'mmseg', config, '--checkpoint', other],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert failed.returncode != 0
    assert 'parameters match' in failed.stdout + failed.stderr
