"""Stock configs of many heads with ClusTR, as docs/drop_in.md describes it."""

import ast
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

from clustr_mm import ClusTR

PAGE = (Path(__file__).parents[1] / 'docs/drop_in.md').read_text()
SNIPPETS = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)

#: The channels of the page, with less in between: a second per config. No stochastic
#: depth: a dropped branch has no gradient.
BACKBONE = dict(
    _delete_=True,
    type='ClusTR',
    arch={**ClusTR.arch_zoo['tiny'], 'depths': [1] * 4, 'mlp_ratios': [1] * 4},
    drop_path_rate=0.0,
)

#: An odd size, of which no stage makes a whole number, and a smaller one.
SIZES = [(75, 91), (69, 66)]


def read_table():
    """The rows of the page: stock config to edits of its model."""

    def read(text):
        pairs = re.findall(r'`([\w.]+)=([^`]+)`', text)
        return {key: ast.literal_eval(value) for key, value in pairs}

    (rgb,) = re.findall(r'^RGB:.*?\n\n', PAGE, re.MULTILINE | re.DOTALL)
    rows = re.findall(r'^\| `(mm[^`]+)` \| (.*) \|$', PAGE, re.MULTILINE)
    return {
        stock: read(cell) | (read(rgb) if cell.endswith(', RGB') else {})
        for stock, cell in rows
    }


TABLE = read_table()
for_table = pytest.mark.parametrize('stock', TABLE, ids=lambda stock: Path(stock).stem)

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


def drop_in(folder, stock, model):
    """Write the config file of a user, and load it."""
    path = folder / 'config.py'
    path.write_text(
        f"_base_ = '{stock}'\n"
        "custom_imports = dict(imports=['clustr_mm'])\n"
        f'model = {nest(model)!r}\n'
    )
    return Config.fromfile(path)


def nest(flat):
    """Turn dotted keys into dicts of dicts."""
    nested = Config()
    nested.merge_from_dict(flat)
    return nested.to_dict()


def build(config):
    init_default_scope(config.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    # As the runner does; some heads leave parameters unset until then.
    model.init_weights()
    assert isinstance(model.backbone, ClusTR)
    return model


def toy_batch(stock, sizes):
    """Make a batch as the dataloader of a stock config does."""
    toolbox = stock.split('::')[0]
    if toolbox == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        shapes = [(3, *size) for size in sizes]
        return demo_mm_inputs(len(sizes), shapes, [2] * len(sizes), with_mask=True)
    if toolbox == 'mmpose':
        from mmpose.testing import get_packed_inputs

        height, width = sizes[0]
        heatmap_size = -(-width // 32) * 8, -(-height // 32) * 8
        return get_packed_inputs(
            img_shape=sizes[0], input_size=(width, height), heatmap_size=heatmap_size
        )
    samples = []
    if toolbox == 'mmpretrain':
        from mmpretrain.structures import DataSample

        sizes = [sizes[0]] * len(sizes)  # its images of a batch have one size
        samples = [DataSample().set_gt_label(3) for _ in sizes]
    for size in sizes if toolbox == 'mmseg' else ():
        from mmseg.structures import SegDataSample

        labels = PixelData(data=torch.randint(0, 150, (1, *size)))
        metainfo = dict(img_shape=size, ori_shape=size)
        samples.append(SegDataSample(metainfo=metainfo, gt_sem_seg=labels))
    inputs = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    if toolbox == 'mmpretrain':
        inputs = torch.stack(inputs)
    return dict(inputs=inputs, data_samples=samples)


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


@for_table
def test_stock_config_trains_and_predicts(stock, tmp_path):
    config = drop_in(tmp_path, stock, {'backbone': BACKBONE, **TABLE[stock]})
    for part, keys in CHEAPER.items():
        if part in stock:
            config.merge_from_dict({f'model.{key}': keys[key] for key in keys})
    model = build(config)
    # SimCC heads have one weight per position of the map; the others take any size.
    sizes = [(256, 192)] if re.search('simcc|rtmpose', stock) else SIZES

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
        check_prediction(stock.split('::')[0], sample, sizes[0])


@for_table
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


def test_page_is_read_whole():
    assert [re.search(r'mm\w+', text)[0] for text in SNIPPETS] == [
        *('mmdet', 'mmseg', 'mmpose', 'mmpretrain')
    ]
    assert len(TABLE) == PAGE.count('\n| `mm') > 20


@pytest.mark.parametrize('snippet', SNIPPETS, ids=lambda s: re.search(r'mm\w+', s)[0])
def test_config_of_the_page(snippet, tmp_path):
    written = {}
    exec(snippet, written)
    del written['model']['backbone']
    assert written['model'] == nest(TABLE[written['_base_']])
    (tmp_path / 'config.py').write_text(snippet)
    config = Config.fromfile(tmp_path / 'config.py')
    model = build(config).eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64), None)

    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    schedule = config.param_scheduler
    for part in schedule if isinstance(schedule, list) else [schedule]:
        # The stock schedules of mmseg would end above where AdamW begins.
        assert part.get('eta_min', 0) < optimizer.defaults['lr']


@pytest.mark.parametrize(
    ('stock', 'model', 'message'),
    [
        (
            'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py',
            {'backbone': BACKBONE, 'pretrained': 'open-mmlab://resnet50_v1c'},
            'pretrained',
        ),
        (
            'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
            {'backbone': dict(type='ClusTR')},
            "unexpected keyword argument .*'depth', .*_delete_=True",
        ),
    ],
)
def test_keys_of_the_old_backbone_must_go(tmp_path, stock, model, message):
    config = drop_in(tmp_path, stock, model)
    with pytest.raises(TypeError, match=message):
        build(config)
