"""Configs and registries, as the stock toolboxes see them."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import find_backbone, our_types
from make_toy_data import make_toy_data
from mmengine.config import Config
from mmengine.model import convert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

import clustr_mm

CONFIGS = Path(__file__).parents[1] / 'configs'
ALL = sorted(p for p in CONFIGS.glob('*/*.py') if p.parent.name != '_base_')
TINY = dict(
    mmdet=CONFIGS / 'mmdet/mask-rcnn_clustr-t_fpn_1x_coco.py',
    mmseg=CONFIGS / 'mmseg/fpn_clustr-t_4xb4-80k_ade20k-512x512.py',
    mmpose=CONFIGS / 'mmpose/td-hm_clustr-t_8xb64-210e_coco-wholebody-256x192.py',
    mmpretrain=CONFIGS / 'mmpretrain/clustr-t_8xb128_in1k.py',
)

#: What a name says of another clustering than the paper's.
SUFFIX = re.compile(r'-(w224|linear)(?=_)')
CLUSTERED_OTHERWISE = [path for path in ALL if SUFFIX.search(path.stem)]

#: Last channels of what has a config for every task that pre-training is for.
CHANNELS = {
    **dict.fromkeys(['clustr-t', 'clustr-s', 'clustr-b', 'linglo-b2'], 512),
    **{'dualvit-s': 448, 'stt-s25': 384},
}
VARIANTS = list(CHANNELS)


def build(config):
    """The model of a config."""
    init_default_scope(config.default_scope)
    return MODELS.build(config.model)


def of_variant(pattern, variant):
    """The config of a variant, loaded."""
    return Config.fromfile(CONFIGS / pattern.format(variant))


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg', 'mmpose', 'mmpretrain'])
def test_every_toolbox_builds_the_backbone(toolbox):
    registry = importlib.import_module(f'{toolbox}.registry')
    model = registry.MODELS.build(dict(type='ClusTR', arch='tiny', out_indices=(0,)))
    assert isinstance(model, clustr_mm.ClusTR)


@pytest.mark.parametrize('path', ALL, ids=lambda p: p.stem)
def test_every_config_builds_and_runs(path):
    config = Config.fromfile(path)
    model = build(config).eval()
    image = torch.zeros(1, 3, 64, 96)
    with torch.no_grad():
        maps = model.extract_feat(image)
        if path.parent.name == 'mmdet':
            assert [x.shape[2:] for x in maps[:2]] == (
                [(16, 24), (8, 12)] if 'mask' in path.stem else [(8, 12), (4, 6)]
            )
            assert len(maps) == 5 and maps[0].shape[1] == 256
        elif path.parent.name == 'mmseg':
            assert model(image).shape == (1, 150, 16, 24)
        elif path.parent.name == 'mmpose':
            assert model.head(maps).shape == (1, 133, 16, 24)
        else:
            assert model.head(maps).shape == (1, 1000)


@pytest.mark.parametrize('path', ALL, ids=lambda p: p.stem)
def test_names_tell_the_backbone(path):
    config = Config.fromfile(path)
    kinds = '|'.join(our_types())
    name = re.search(rf'(?:^|_)((?:{kinds})-[a-z0-9-]+)_', path.stem)[1]
    kind, arch = name.split('-')[:2]
    backbone = MODELS.build(config.model.backbone)
    cls = our_types()[kind]
    assert type(backbone) is cls
    assert backbone.arch_settings is cls.arch_zoo[arch]
    # A suffix means here what it means to the tools.
    for key in ('clusterer', 'max_clusters'):
        assert config.model.backbone.get(key) == find_backbone(name).cfg.get(key)
    if 'toy' not in path.stem:
        expected = {'clustr-b': 0.3, 'dualvit-s': 0.15}.get(f'{kind}-{arch}', 0.1)
        assert backbone.drop_path_rate == expected


@pytest.mark.parametrize('path', CLUSTERED_OTHERWISE, ids=lambda p: p.stem)
def test_only_the_clustering_differs(path):
    """From the config without suffix: figures compare, and checkpoints load."""
    configs, shapes = [], []
    for name in (path.name, SUFFIX.sub('', path.name)):
        config = Config.fromfile(path.with_name(name))
        with torch.device('meta'):
            state = MODELS.build(config.model.backbone).state_dict()
        shapes.append({key: value.shape for key, value in state.items()})
        for setting in ('clusterer', 'max_clusters'):
            config.model.backbone.pop(setting, None)
        configs.append(config.to_dict())
    assert configs[0] == configs[1]
    assert shapes[0] == shapes[1]


def test_variants_are_short():
    for path in ALL:
        if 'clustr-t_' not in path.stem and 'retinanet' not in path.stem:
            assert len(path.read_text().splitlines()) < 15, path


@pytest.mark.parametrize('variant', VARIANTS)
def test_semantic_fpn_recipe(variant):
    config = of_variant('mmseg/fpn_{}_4xb4-80k_ade20k-512x512.py', variant)
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


@pytest.mark.parametrize('variant', VARIANTS)
def test_upernet_recipe(variant):
    config = of_variant('mmseg/upernet_{}_8xb2-160k_ade20k-512x512.py', variant)
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (6e-5, 0.01)
    assert config.train_dataloader.batch_size * 8 == 16
    assert config.train_cfg.max_iters == 160000
    warm_up, schedule = config.param_scheduler
    assert (warm_up.type, warm_up.begin, warm_up.end) == ('LinearLR', 0, 1500)
    assert (schedule.type, schedule.power, schedule.end) == ('PolyLR', 1.0, 160000)
    auxiliary = config.model.auxiliary_head
    assert (auxiliary.in_index, auxiliary.loss_decode.loss_weight) == (2, 0.4)
    assert 'norm' not in decayed(config)


@pytest.mark.parametrize(
    ('variant', 'lr'),
    [
        *((f'mask-rcnn_{variant}', 2e-4) for variant in VARIANTS),
        ('retinanet_clustr-s', 1e-4),
        ('retinanet_linglo-b2', 1e-4),
    ],
)
def test_detection_recipe(variant, lr):
    config = of_variant('mmdet/{}_fpn_1x_coco.py', variant)
    assert config.optim_wrapper.optimizer == dict(
        type='AdamW', lr=lr, weight_decay=1e-4
    )
    assert config.train_dataloader.batch_size * 8 == 16
    assert config.train_cfg.max_epochs == 12
    warm_up, schedule = config.param_scheduler
    assert (warm_up.end, warm_up.by_epoch) == (500, False)
    assert schedule.milestones == [8, 11]
    for loader, step in ((config.train_dataloader, 2), (config.test_dataloader, 1)):
        resize = loader.dataset.pipeline[step]
        assert (resize.type, tuple(resize.scale)) == ('Resize', (1333, 800))


@pytest.mark.parametrize(
    ('path', 'size', 'sigma'),
    [
        ('td-hm_clustr-t_8xb64-210e_coco-wholebody-256x192', (192, 256), 2),
        ('td-hm_clustr-s_8xb64-210e_coco-wholebody-256x192', (192, 256), 2),
        ('td-hm_clustr-b_8xb64-210e_coco-wholebody-256x192', (192, 256), 2),
        ('td-hm_clustr-s_8xb64-210e_coco-wholebody-384x288', (288, 384), 3),
        ('td-hm_clustr-s_deconv-8xb64-210e_coco-wholebody-256x192', (192, 256), 2),
    ],
)
def test_pose_recipe(path, size, sigma):
    config = of_variant(f'mmpose/{path}.py', '')
    assert config.optim_wrapper.optimizer == dict(
        type='AdamW', lr=5e-4, weight_decay=0.01
    )
    assert (config.train_dataloader.batch_size, config.train_cfg.max_epochs) == (
        64,
        210,
    )
    assert config.param_scheduler[0]['end'] == 500
    assert config.param_scheduler[1]['milestones'] == [170, 200]
    assert config.model.test_cfg.flip_test
    for loader in (config.train_dataloader, config.test_dataloader):
        steps = {step.type: step for step in loader.dataset.pipeline}
        assert tuple(steps['TopdownAffine'].input_size) == size
    encoder = config.train_dataloader.dataset.pipeline[6].encoder
    for codec in (encoder, config.model.head.decoder):
        assert tuple(codec.input_size) == size and codec.sigma == sigma
        assert tuple(codec.heatmap_size) == (size[0] // 4, size[1] // 4)
    assert config.test_dataloader.dataset.bbox_file.endswith(
        'COCO_val2017_detections_AP_H_56_person.json'
    )


@pytest.mark.parametrize('path', ALL, ids=lambda p: p.stem)
def test_batch_norms_of_a_stem_see_all_gpus(path):
    """In segmentors, of which a GPU has too few images, as in the public code."""
    config = Config.fromfile(path)
    if path.parent.name == 'mmseg' and 'dualvit' in path.stem:
        model = convert_sync_batchnorm(build(config), config.sync_bn)
        stem = model.backbone.stages[0].patch_embed
        kinds = [type(module).__name__ for module in stem.modules()]
        assert kinds.count('SyncBatchNorm') == 3 and 'BatchNorm2d' not in kinds
    else:
        assert 'sync_bn' not in config


@pytest.mark.parametrize('variant', VARIANTS)
def test_imagenet_recipe(variant):
    config = of_variant('mmpretrain/{}_8xb128_in1k.py', variant)
    model = build(config)
    parameters = sum(p.numel() for p in model.parameters())
    backbone = sum(p.numel() for p in model.backbone.parameters())
    assert parameters == backbone + 1000 * (CHANNELS[variant] + 1)
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (1e-3, 0.05)
    assert config.train_dataloader.batch_size * 8 == 1024
    assert config.train_dataloader.sampler.type == 'RepeatAugSampler'
    assert config.train_cfg.max_epochs == 300
    warm_up, schedule = config.param_scheduler
    assert (warm_up['end'], warm_up['start_factor'] * optimizer.lr) == (5, 1e-6)
    assert (schedule['type'], schedule['eta_min']) == ('CosineAnnealingLR', 1e-5)
    assert [a.alpha for a in config.model.train_cfg.augments] == [0.8, 1.0]
    clip = config.optim_wrapper.get('clip_grad')
    assert clip == (dict(max_norm=1.0) if variant == 'clustr-b' else None)
    kinds = decayed(config)
    assert not {'norm', 'bias'} & kinds and 'weight' in kinds


def decayed(config):
    """Kinds of the backbone's parameters that the optimizer decays."""
    model = build(config)
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    names = {id(p): name for name, p in model.named_parameters()}
    norms = {
        id(p)
        for module in model.modules()
        if isinstance(module, torch.nn.LayerNorm)
        for p in module.parameters()
    }
    kinds = set()
    for group in wrapper.optimizer.param_groups:
        for parameter in group['params']:
            name = names[id(parameter)]
            if name.startswith('backbone.') and group['weight_decay']:
                kind = 'norm' if id(parameter) in norms else name.rsplit('.', 1)[1]
                kinds.add(kind)
    return kinds


def test_one_checkpoint_starts_every_task(tmp_path, monkeypatch):
    """The classifier's file, named once in the environment."""
    classifier = build(Config.fromfile(TINY['mmpretrain']))
    file = tmp_path / 'epoch_300.pth'
    torch.save(dict(meta={}, state_dict=classifier.state_dict()), file)
    monkeypatch.setenv('CLUSTR_CHECKPOINT', str(file))
    for toolbox in ('mmdet', 'mmseg', 'mmpose'):
        model = build(Config.fromfile(TINY[toolbox]))
        model.init_weights()
        for name, value in model.backbone.state_dict().items():
            assert torch.equal(value, classifier.backbone.state_dict()[name])

    monkeypatch.setenv('CLUSTR_CHECKPOINT', str(tmp_path / 'absent.pth'))
    model = build(Config.fromfile(TINY['mmseg']))
    with pytest.raises(FileNotFoundError, match='absent.pth'):
        model.init_weights()


def mim(command, toolbox, cwd, *arguments, env=None):
    return subprocess.run(
        [sys.executable, '-m', 'mim', command, toolbox, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},
    )


#: Toolbox -> toy task, where its data is looked for, a metric and its range, and
#: what makes the run short.
RUNS = dict(
    mmdet=('coco', 'data/coco', 'coco/segm_mAP', 1, {'train_cfg.max_epochs': 1}),
    mmseg=(
        *('ade20k', 'data/ade/ADEChallengeData2016', 'mIoU', 100),
        {
            'train_cfg.max_iters': 2,
            'train_cfg.val_interval': 9,
            'model.data_preprocessor.size': (64, 64),
            'train_dataloader.dataset.pipeline.2.scale': (128, 64),
            'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
            'val_dataloader.dataset.pipeline.1.scale': (128, 64),
            'test_dataloader.dataset.pipeline.1.scale': (128, 64),
        },
    ),
    mmpose=(
        *('coco', 'data/coco', 'coco-wholebody/AP', 1),
        {'train_cfg.max_epochs': 1},
    ),
    mmpretrain=(
        *('imagenet', 'data/imagenet', 'accuracy/top1', 100),
        {'train_cfg.max_epochs': 1},
    ),
)


def prepare(toolbox, folder):
    """Put toy data where the configs look for it; metric, range and settings."""
    task, place, metric, most, shorter = RUNS[toolbox]
    root, _ = make_toy_data(task, folder / 'toy', 2, 2, 64, 0)
    place = folder / place
    place.parent.mkdir(parents=True)
    place.symlink_to(root)
    loaders = {
        f'{part}_dataloader.{key}': value
        for part in ('train', 'val', 'test')
        for key, value in [('num_workers', 0), ('persistent_workers', False)]
    }
    loaders['train_dataloader.batch_size'] = 1
    return metric, most, {**shorter, **loaders, 'default_hooks.logger.interval': 1}


@pytest.mark.parametrize('toolbox', RUNS)
def test_mim_train_and_test(toolbox, tmp_path):
    """The real config, from a foreign directory, on data in its place."""
    metric, most, shorter = prepare(toolbox, tmp_path)
    shorter = ['--cfg-options', *(f'{key}={value}' for key, value in shorter.items())]
    config = TINY[toolbox]
    env = dict(CLUSTR_IMG_SCALE='160,96')
    done = mim('train', toolbox, tmp_path, config, *shorter, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    work_dir = tmp_path / 'work_dirs' / config.stem
    checkpoint = Path((work_dir / 'last_checkpoint').read_text())
    losses = [float(x) for x in re.findall(r' loss: (\S+)', done.stdout + done.stderr)]
    assert losses and all(math.isfinite(loss) for loss in losses)

    done = mim(
        'test', toolbox, tmp_path, config, '--checkpoint', checkpoint,
        '--work-dir', tmp_path / 'tested', *shorter, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (metrics,) = (tmp_path / 'tested').glob('*/*.json')
    value = json.loads(metrics.read_text()).get(metric)
    if value is None:  # after two iterations a detector may see nothing
        assert toolbox == 'mmdet'
        assert 'results of the whole dataset is empty' in done.stdout + done.stderr
    else:
        assert -1 <= value <= most


def shrink(setting):
    """Input sizes, wherever they are, to what the toy data has."""
    if isinstance(setting, dict):
        return {key: shrink(value) for key, value in setting.items()}
    if setting in ((512, 512), (2048, 512), (1333, 800), 224, 256):
        return 64 if isinstance(setting, int) else (64, 64)
    if isinstance(setting, (list, tuple)):
        return type(setting)(map(shrink, setting))
    return setting


OTHERS = [path for path in ALL if 'clustr' not in path.stem]


@pytest.mark.parametrize('path', OTHERS, ids=lambda p: p.stem)
def test_other_backbones_train_and_test(path, tmp_path, monkeypatch):
    """As above in one process, on small images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CLUSTR_IMG_SCALE', '96,64')
    metric, most, shorter = prepare(path.parent.name, tmp_path)
    config = Config.fromfile(path)
    shorter['default_hooks.checkpoint.save_optimizer'] = False  # three times smaller
    shorter['visualizer.name'] = path.stem  # by name it is shared within a process
    config.merge_from_dict({**shorter, 'log_level': 'ERROR', 'work_dir': 'work'})
    config.train_dataloader.batch_size = 2  # batch norm at one pixel
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        config[key] = shrink(config[key].to_dict())
    runner = Runner.from_cfg(config)
    before = {k: v.clone() for k, v in runner.model.named_parameters()}
    runner.train()
    changed = [k for k, v in runner.model.named_parameters() if not v.equal(before[k])]
    assert any(k.startswith('backbone.') for k in changed)
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) and all(math.isfinite(loss) for loss in losses)
    assert -1 <= runner.test().get(metric, 0) <= most
