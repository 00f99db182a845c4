"""Stock configs of many heads with ClusTR, as docs/drop_in.md describes it."""

import ast
import importlib
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from test_models.variants import ARCHS

import clustr_mm

PAGE = Path(__file__).parents[1] / 'docs/drop_in.md'

#: Channels of 'tiny' and 'small', which the page writes out.
PAGE_DIMS = [64, 128, 256, 512]

#: Small enough for a second per config; no two stages from which a head reads alone
#: have the same channels.
ARCH = {**ARCHS['ClusTR'], 'depths': [1, 1, 1, 1]}

#: An odd size, of which no stage makes a whole number, and a smaller one.
SIZES = [(75, 91), (69, 66)]

#: Input of the heads that are built for one size.
POSE_SIZE = (256, 192)


def page_table():
    """Read the rows of the page: stock config to edits of its model."""
    page = PAGE.read_text()

    def read(text):
        return {
            key: ast.literal_eval(value)
            for key, value in re.findall(r'`([\w.]+)=([^`]+)`', text)
        }

    (rgb,) = re.findall(r'^RGB:.*?\n\n', page, re.MULTILINE | re.DOTALL)
    rows = re.findall(r'^\| `(mm[^`]+)` \| (.*) \|$', page, re.MULTILINE)
    return {
        stock: read(cell) | (read(rgb) if cell.endswith(', RGB') else {})
        for stock, cell in rows
    }


TABLE = page_table()


def with_channels_of_arch(value):
    """A value of the page, with the channels of ``ARCH``."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(with_channels_of_arch, value))
    return dict(zip(PAGE_DIMS, ARCH['embed_dims'])).get(value, value)


#: What makes a head cheaper, fits it to images as small as these, or lets an untrained
#: one find something; not part of the page.
ONE_LAYER = {'encoder.num_layers': 1, 'decoder.num_layers': 1}
MASK2FORMER = {
    'pixel_decoder.encoder.num_layers': 1,
    'transformer_decoder.num_layers': 1,
    'num_queries': 10,
}
CHEAPER = {
    'mmdet': {'test_cfg.score_thr': 0.0},
    'rcnn': {'test_cfg.rcnn.score_thr': 0.0},
    'cascade-mask-rcnn': {
        **{f'roi_head.bbox_head.{i}.fc_out_channels': 32 for i in range(3)},
        'rpn_head.feat_channels': 32,
        'train_cfg.rpn_proposal.max_per_img': 20,
        'test_cfg.rpn.max_per_img': 20,
    },
    'faster-rcnn': {
        'roi_head.bbox_head.fc_out_channels': 32,
        'train_cfg.rpn_proposal.max_per_img': 20,
        'test_cfg.rpn.max_per_img': 20,
    },
    'rtmdet': {
        # The neck doubles maps: it needs even ones.
        'data_preprocessor.pad_size_divisor': 32,
        'neck.num_csp_blocks': 1,
    },
    '/detr_': ONE_LAYER | {'num_queries': 10, 'test_cfg.max_per_img': 10},
    'deformable-detr': ONE_LAYER | {'num_queries': 10},
    # No more queries than tokens.
    'dino': ONE_LAYER | {'num_queries': 20, 'dn_cfg.group_cfg.num_dn_queries': 5},
    'mmdet::mask2former': {
        **{f'panoptic_head.{key}': value for key, value in MASK2FORMER.items()},
        'data_preprocessor.batch_augments': None,
        'train_cfg.num_points': 100,
    },
    'mmseg::mask2former': {
        **{f'decode_head.{key}': value for key, value in MASK2FORMER.items()},
        'decode_head.train_cfg.num_points': 100,
    },
    'mmseg': {'data_preprocessor.size': SIZES[0]},
    'pointrend': {'train_cfg.num_points': 50, 'test_cfg.subdivision_num_points': 50},
}


def nest(flat):
    """Turn dotted keys into dicts of dicts."""
    nested = {}
    for key, value in flat.items():
        *parents, name = key.split('.')
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return nested


def drop_in(folder, stock):
    """Load a stock config with a small ClusTR and the edits of the page."""
    # No stochastic depth: a dropped branch has no gradient.
    model = {
        'backbone': dict(_delete_=True, type='ClusTR', arch=ARCH, drop_path_rate=0.0),
        **{key: with_channels_of_arch(TABLE[stock][key]) for key in TABLE[stock]},
    }
    path = folder / 'config.py'
    path.write_text(
        f"_base_ = '{stock}'\n"
        "custom_imports = dict(imports=['clustr_mm'])\n"
        f'model = {nest(model)!r}\n'
    )
    return Config.fromfile(path)


def build(config):
    init_default_scope(config.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    # As the runner does; some heads leave parameters unset until then.
    model.init_weights()
    assert isinstance(model.backbone, clustr_mm.ClusTR)
    return model


def detection_sample(size, with_mask):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    sample = DetDataSample(
        metainfo=dict(img_id=0, img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[10.0, 8.0, 60.0, 48.0]]),
        labels=torch.tensor([3]),
    )
    if with_mask:
        masks = np.zeros((1, *size), np.uint8)
        masks[0, 8:48, 10:60] = 1
        sample.gt_instances.masks = BitmapMasks(masks, *size)
    return sample


def segmentation_sample(size):
    from mmseg.structures import SegDataSample

    labels = torch.zeros(1, *size, dtype=torch.long)
    labels[:, 8:48, 10:60] = 3
    sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
    sample.gt_sem_seg = PixelData(data=labels)
    return sample


def classification_sample(size):
    from mmpretrain.structures import DataSample

    return DataSample(metainfo=dict(img_shape=size)).set_gt_label(3)


def pose_batch(size):
    """Poses of mmpose's own tests; their targets are made for one input size."""
    from mmpose.testing import get_packed_inputs

    height, width = size
    return get_packed_inputs(
        img_shape=size,
        input_size=(width, height),
        heatmap_size=(-(-width // 32) * 8, -(-height // 32) * 8),
    )


def toy_batch(stock, sizes):
    """Make a batch as the dataloader of a stock config does."""
    toolbox = stock.split('::')[0]
    if toolbox == 'mmpose':
        return pose_batch(sizes[0])
    inputs = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    if toolbox == 'mmpretrain':
        # Its images of a batch have one size.
        inputs = torch.stack([inputs[0]] * len(inputs))
        sizes = [sizes[0]] * len(sizes)
    make = dict(
        mmdet=partial(detection_sample, with_mask='mask' in stock),
        mmseg=segmentation_sample,
        mmpretrain=classification_sample,
    )[toolbox]
    return dict(inputs=inputs, data_samples=[make(size) for size in sizes])


def check_prediction(toolbox, sample, size):
    """Check that a prediction is complete and finite."""
    if toolbox == 'mmseg':
        assert sample.seg_logits.data.shape == (150, *size)
        assert sample.seg_logits.data.isfinite().all()
        assert sample.pred_sem_seg.data.shape == (1, *size)
    elif toolbox == 'mmpretrain':
        assert sample.pred_score.shape == (1000,)
        torch.testing.assert_close(sample.pred_score.sum(), torch.tensor(1.0))
    elif toolbox == 'mmpose':
        assert sample.pred_instances.keypoints.shape == (1, 17, 2)
        assert np.isfinite(sample.pred_instances.keypoints).all()
    else:
        assert len(sample.pred_instances.bboxes) > 0
        assert sample.pred_instances.bboxes.isfinite().all()
        assert sample.pred_instances.scores.isfinite().all()


@pytest.mark.parametrize('stock', TABLE, ids=lambda s: Path(s).stem)
def test_stock_config_trains_and_predicts(stock, tmp_path):
    toolbox = stock.split('::')[0]
    config = drop_in(tmp_path, stock)
    for part, keys in CHEAPER.items():
        if part in stock:
            config.merge_from_dict({f'model.{key}': keys[key] for key in keys})
    model = build(config)
    # SimCC heads have one weight per position of the map; the others take any size.
    sizes = [POSE_SIZE] if re.search('simcc|rtmpose', stock) else SIZES

    model.train()
    batch = model.data_preprocessor(toy_batch(stock, sizes), training=True)
    loss, logged = model.parse_losses(model(**batch, mode='loss'))
    assert loss.requires_grad and loss.isfinite(), logged
    loss.backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # The importance of all tokens alike does not matter.
        assert parameter.grad.any() or name.endswith('importance.bias'), name

    model.eval()
    with torch.no_grad():
        predictions = model.test_step(toy_batch(stock, sizes[:1]))
    assert predictions
    for sample in predictions:
        check_prediction(toolbox, sample, sizes[0])


def test_table_of_the_page():
    assert len(TABLE) == 25
    for arch in ['tiny', 'small']:
        assert clustr_mm.ClusTR.arch_zoo[arch]['embed_dims'] == PAGE_DIMS


@pytest.mark.parametrize('stock', TABLE, ids=lambda s: Path(s).stem)
def test_table_names_only_keys_that_change(stock):
    toolbox, path = stock.split('::')
    configs = Path(importlib.import_module(toolbox).__file__).parent / '.mim/configs'
    model = Config.fromfile(configs / path).model
    for key, value in TABLE[stock].items():
        old = model
        for name in key.split('.'):
            old = old.get(name)
        # Stock keys of the backbone go with it, and must be said again.
        assert old != value or key.startswith('backbone.'), key
    if toolbox in ('mmdet', 'mmseg'):
        pixels = {
            **model.data_preprocessor,
            **nest(TABLE[stock]).get('data_preprocessor', {}),
        }
        assert pixels['mean'] == [123.675, 116.28, 103.53] and pixels['bgr_to_rgb']
        assert pixels['std'] == [58.395, 57.12, 57.375]


SNIPPETS = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)


def test_page_has_a_config_for_each_toolbox():
    bases = [re.search(r"'(\w+)::", snippet)[1] for snippet in SNIPPETS]
    assert bases == ['mmdet', 'mmseg', 'mmpose', 'mmpretrain']


@pytest.mark.parametrize('snippet', SNIPPETS, ids=lambda s: re.search(r'mm\w+', s)[0])
def test_config_of_the_page(snippet, tmp_path):
    written = {}
    exec(snippet, written)
    assert written['model'] == nest(TABLE[written['_base_']]) | dict(
        backbone=dict(_delete_=True, type='ClusTR', arch='small')
    )

    path = tmp_path / 'config.py'
    path.write_text(snippet)
    config = Config.fromfile(path)
    model = build(config).eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64), None)

    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    schedule = config.param_scheduler
    for part in schedule if isinstance(schedule, list) else [schedule]:
        # The stock schedules of mmseg would end above where AdamW begins.
        assert part.get('eta_min', 0) < optimizer.defaults['lr']


def test_pretrained_of_mmseg_must_go(tmp_path):
    stock = 'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'
    config = drop_in(tmp_path, stock)
    config.model.pretrained = 'open-mmlab://resnet50_v1c'
    with pytest.raises(TypeError, match='pretrained'):
        build(config)
