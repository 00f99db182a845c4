"""Configs: what their names say is what they hold, and the stock tools take them."""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from backbones import find_backbone, our_types
from make_toy_data import make_toy_data
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

CONFIGS = Path(__file__).parents[1] / 'configs'
ALL = sorted(p for p in CONFIGS.glob('*/*.py') if p.parent.name != '_base_')
TINY = dict(
    mmdet=CONFIGS / 'mmdet/mask-rcnn_clustr-t_fpn_1x_coco.py',
    mmseg=CONFIGS / 'mmseg/fpn_clustr-t_4xb4-80k_ade20k-512x512.py',
    mmpose=CONFIGS / 'mmpose/td-hm_clustr-t_8xb64-210e_coco-wholebody-256x192.py',
    mmpretrain=CONFIGS / 'mmpretrain/clustr-t_8xb128_in1k.py',
)
for_all = pytest.mark.parametrize('path', ALL, ids=lambda path: path.stem)

#: The backbone in a config's name: '-w224' and '-linear' are ways of clustering.
BACKBONE = re.compile(rf'(?:{"|".join(our_types())})-[a-z0-9]+(-w224|-linear)?(?=_)')

#: The rest of a name, in OpenMMLab's scheme: images of a batch, length, data, size.
SCHEDULE = re.compile(r'_(?:\w+-)?(?P<gpus>\d+)xb(?P<batch>\d+)(?:-(?P<length>\w+))?_')
SIZE = re.compile(r'-(\d+)x(\d+)$')

#: Of a config, what the runner takes for a training.
PARTS = ('model', 'train_dataloader', 'val_dataloader', 'optim_wrapper', 'train_cfg')
PARTS += ('param_scheduler', 'auto_scale_lr', 'default_hooks', 'randomness')

#: Name of a config -> the parameters of its model, as the metafiles have it.
PARAMETERS = {
    model['Name']: model['Metadata']['Parameters']
    for file in CONFIGS.glob('*/metafile.yml')
    for model in yaml.safe_load(file.read_text())['Models']
}

read = functools.cache(Config.fromfile)


def build(path, device='meta'):
    """The model of a config; on the meta device without memory and time."""
    init_default_scope(read(path).default_scope)
    with torch.device(device):
        return MODELS.build(read(path).model)


@for_all
def test_every_config_builds_and_runs(path):
    toolbox = path.parent.name
    model = build(path).eval()
    if 'toy' not in path.stem:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert parameters == PARAMETERS[path.stem]
    image = torch.zeros(1, 3, 64, 96, device='meta')
    with torch.no_grad():
        maps = model.extract_feat(image)
        if toolbox == 'mmdet':
            strides = [4, 8] if path.stem.startswith('mask-rcnn') else [8, 16]
            assert [x.shape[1:] for x in maps[:2]] == [
                (256, 64 // stride, 96 // stride) for stride in strides
            ]
        elif toolbox == 'mmseg':
            assert model.decode_head(maps).shape == (1, 150, 16, 24)
        elif toolbox == 'mmpose':
            assert model.head(maps).shape == (1, 133, 16, 24)
        else:
            assert model.head(maps).shape == (1, 1000)


@for_all
def test_names_tell_the_backbone(path):
    name = BACKBONE.search(path.stem)[0]
    backbone, expected = read(path).model.backbone, find_backbone(name).cfg
    cls = our_types()[expected['type'].lower()]
    assert backbone.type == expected['type']
    assert cls.arch_zoo[backbone.arch] is cls.arch_zoo[expected['arch']]
    # A suffix means here what it means to the tools.
    for key in ('clusterer', 'max_clusters'):
        assert backbone.get(key) == expected.get(key)


@for_all
def test_names_tell_the_recipe(path):
    config = read(path)
    batch = config.train_dataloader.batch_size
    if path.stem.endswith('_1x_coco'):
        assert (config.train_cfg.max_epochs, batch * 8) == (12, 16)
    elif 'toy' not in path.stem:
        said = SCHEDULE.search(path.stem)
        assert batch == int(said['batch'])
        length = (said['length'] or '300e').replace('k', '000').removesuffix('e')
        limits = config.train_cfg.get('max_iters'), config.train_cfg.get('max_epochs')
        assert int(length) in limits
        # The learning rate falls until the end.
        assert config.param_scheduler[-1].end == int(length)
        if path.parent.name != 'mmseg':  # which has no option for it
            assert config.auto_scale_lr.base_batch_size == batch * int(said['gpus'])
    if SIZE.search(path.stem):
        size = tuple(map(int, SIZE.search(path.stem).groups()))
        steps = {s.type: s for s in config.train_dataloader.dataset.pipeline}
        if path.parent.name == 'mmpose':
            assert steps['TopdownAffine'].input_size == size[::-1]
            assert config.model.head.decoder.input_size == size[::-1]
        else:
            assert steps['RandomCrop'].crop_size == size
            assert config.model.data_preprocessor.size == size
    # As in the public segmentors of this one, whose stem has batch norms.
    sync = path.parent.name == 'mmseg' and 'dualvit' in path.stem
    assert config.get('sync_bn') == ('torch' if sync else None)


def flatten(value, prefix=''):
    """The leaves of a config, by dotted names."""
    if isinstance(value, (list, tuple)) and any(isinstance(x, dict) for x in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    leaves = {}
    for key, inner in value.items():
        if key == '_scope_':  # left by an import, and not of a recipe
            continue
        leaves.update(flatten(inner, f'{prefix}.{key}' if prefix else str(key)))
    return leaves


@for_all
def test_variants_differ_only_in_what_they_say(path):
    """From the config of ClusTR-tiny, so that figures compare."""
    suffix = BACKBONE.search(path.stem)[1]
    if suffix:  # not even the drop path differs
        base = path.with_name(path.name.replace(suffix, ''))
        allowed = r'model\.backbone\.(clusterer\.|max_clusters$)'
    else:
        base = path.with_name(BACKBONE.sub('clustr-t', path.name))
        allowed = (
            r'model\.(backbone|neck)\b|.*\.in_channels$|optim_wrapper\.clip_grad\.'
        )
    if not base.exists():  # of other sizes or another head there is no tiny one
        base = TINY[path.parent.name]
        allowed += r'|.*(input_size|heatmap_size|sigma)$|model\.head\.'
    own, other = (
        flatten({part: read(p).get(part) for part in PARTS}) for p in (path, base)
    )
    differing = {k for k in own.keys() | other.keys() if own.get(k) != other.get(k)}
    assert not [key for key in differing if not re.match(allowed, key)]
    if base != path:
        assert differing
        if path.stem != 'retinanet_clustr-s_fpn_1x_coco':  # from which its tiny one is
            assert len(path.read_text().splitlines()) < 15


@pytest.mark.parametrize('backbone', ['clustr-t', 'dualvit-s', 'linglo-b2', 'stt-s25'])
@pytest.mark.parametrize(
    ('recipe', 'kinds'),
    [
        ('mmseg/upernet_{}_8xb2-160k_ade20k-512x512.py', {'weight', 'bias'}),
        ('mmpretrain/{}_8xb128_in1k.py', {'weight'}),
    ],
)
def test_norms_do_not_decay(recipe, kinds, backbone):
    path = CONFIGS / recipe.format(backbone)
    model = build(path)
    wrapper = build_optim_wrapper(model, read(path).optim_wrapper)
    decayed = {
        parameter
        for group in wrapper.optimizer.param_groups
        if group['weight_decay']
        for parameter in group['params']
    }
    norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert norms and not any(p in decayed for m in norms for p in m.parameters())
    names = [name for name, p in model.backbone.named_parameters() if p in decayed]
    assert kinds <= {name.rsplit('.', 1)[1] for name in names}
    assert ('bias' in kinds) == any(name.endswith('.bias') for name in names)


def test_one_checkpoint_starts_every_task(tmp_path, monkeypatch):
    """The classifier's file, named once in the environment."""
    classifier = build(TINY['mmpretrain'], 'cpu')
    file = tmp_path / 'epoch_300.pth'
    torch.save(dict(meta={}, state_dict=classifier.state_dict()), file)
    for name in (file, tmp_path / 'absent.pth'):
        monkeypatch.setenv('CLUSTR_CHECKPOINT', str(name))
        for toolbox in ('mmdet', 'mmseg', 'mmpose'):
            config = Config.fromfile(TINY[toolbox])
            init_default_scope(toolbox)
            backbone = MODELS.build(config.model.backbone)
            if name == file:
                backbone.init_weights()
                for key, value in backbone.state_dict().items():
                    assert torch.equal(value, classifier.backbone.state_dict()[key])
            else:
                with pytest.raises(FileNotFoundError, match='absent.pth'):
                    backbone.init_weights()


EPOCH = {'train_cfg.max_epochs': 1}

#: Toolbox -> toy data, where configs look for it, a metric, and what keeps it short.
RUNS = dict(
    mmdet=(
        *('coco', 'data/coco', 'coco/segm_mAP'),
        # Or an untrained detector may find nothing, of which there is no metric.
        EPOCH
        | {'model.test_cfg.rcnn.score_thr': 0, 'model.test_cfg.rcnn.max_per_img': 9},
    ),
    mmseg=(
        *('ade20k', 'data/ade/ADEChallengeData2016', 'mIoU'),
        {
            'train_cfg.max_iters': 2,
            'train_cfg.val_interval': 2,
            'model.data_preprocessor.size': (64, 64),
            'train_dataloader.dataset.pipeline.2.scale': (128, 64),
            'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
            'val_dataloader.dataset.pipeline.1.scale': (128, 64),
            'test_dataloader.dataset.pipeline.1.scale': (128, 64),
        },
    ),
    mmpose=('coco', 'data/coco', 'coco-wholebody/AP', EPOCH),
    mmpretrain=('imagenet', 'data/imagenet', 'accuracy/top1', EPOCH),
)


def mim(command, config, folder, *arguments):
    """Run the stock tool in a folder of its own, on toy data where configs look."""
    task, place, _, options = RUNS[config.parent.name]
    if not (folder / place).exists():
        root, _ = make_toy_data(task, folder / 'toy', 2, 2, 64, 0)
        (folder / place).parent.mkdir(parents=True)
        (folder / place).symlink_to(root)
    options = {**options, 'default_hooks.logger.interval': 1}
    options['train_dataloader.batch_size'] = 2
    for part in ('train', 'val', 'test'):
        options[f'{part}_dataloader.num_workers'] = 0
        options[f'{part}_dataloader.persistent_workers'] = False
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'mim', command, config.parent.name, str(config)),
            *map(str, arguments),
            *('--cfg-options', *(f'{key}={value}' for key, value in options.items())),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        env=dict(os.environ, CLUSTR_IMG_SCALE='160,96'),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def logged(folder, key):
    """All values of a key in the log of a work dir."""
    (file,) = folder.glob('*/vis_data/scalars.json')
    entries = map(json.loads, file.read_text().splitlines())
    return [entry[key] for entry in entries if key in entry]


@pytest.mark.parametrize(
    'config',
    [
        *TINY.values(),
        CONFIGS / 'mmseg/upernet_dualvit-s_8xb2-160k_ade20k-512x512.py',
    ],
    ids=lambda path: path.stem,
)
def test_mim_train_and_test(config, tmp_path):
    """The real config, from a foreign directory; a test repeats the validation."""
    metric = RUNS[config.parent.name][2]
    mim('train', config, tmp_path, '--work-dir', 'work')
    losses = logged(tmp_path / 'work', 'loss')
    assert losses and all(map(math.isfinite, losses))
    (validated,) = logged(tmp_path / 'work', metric)
    if config in TINY.values():
        checkpoint = (tmp_path / 'work/last_checkpoint').read_text()
        mim(
            'test', config, tmp_path, '--checkpoint', checkpoint, '--work-dir', 'tested'
        )
        (result,) = (tmp_path / 'tested').glob('*/*.json')
        assert json.loads(result.read_text())[metric] == pytest.approx(validated)
