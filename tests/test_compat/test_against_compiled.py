"""The stand-in against mmcv's compiled operators, where those are installed.

``make install MMCV_OPS=1`` compiles them.
"""

import importlib

import pytest
import torch
from naive import randn

from clustr_mm.compat import mmcv_ext, mmcv_ops_are_stand_in

pytestmark = pytest.mark.skipif(
    mmcv_ops_are_stand_in(), reason='mmcv has no compiled operators here'
)
#: Modules of mmcv.ops that call the extension.
USERS = ('nms', 'roi_align', 'focal_loss', 'deform_conv', 'modulated_deform_conv')


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def both(monkeypatch, function):
    """Results of a function with the compiled operators and with the stand-in."""
    compiled = function()
    for user in USERS:
        module = importlib.import_module(f'mmcv.ops.{user}')
        monkeypatch.setattr(module, 'ext_module', mmcv_ext)
    return compiled, function()


def boxes(number, seed=0):
    corner = rand(number, 2, seed=seed) * 60
    return torch.cat([corner, corner + 1 + rand(number, 2, seed=seed + 1) * 40], 1)


def test_the_compiled_extension_is_in_use():
    assert importlib.import_module('mmcv._ext').__file__.endswith('.so')


@pytest.mark.parametrize('number', [0, 1, 300])
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.9])
def test_nms(monkeypatch, number, offset, threshold):
    from mmcv.ops import nms

    a, b = both(
        monkeypatch,
        lambda: nms(boxes(number), rand(number, seed=5), threshold, offset),
    )
    for x, y in zip(a, b):
        assert torch.equal(x, y)


@pytest.mark.parametrize('class_agnostic', [False, True])
@pytest.mark.parametrize('kind', ['nms', 'soft_nms'])
def test_batched_nms(monkeypatch, class_agnostic, kind):
    from mmcv.ops import batched_nms

    labels = torch.randint(4, (200,), generator=torch.Generator().manual_seed(3))
    config = dict(type=kind, iou_threshold=0.5)
    a, b = both(
        monkeypatch,
        lambda: batched_nms(
            boxes(200), rand(200, seed=5), labels, dict(config), class_agnostic
        ),
    )
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-5)
    assert torch.equal(a[1], b[1])


def rois(number):
    image = torch.arange(number).remainder(2).unsqueeze(1).float()
    return torch.cat([image, boxes(number) - 10], dim=1)


def with_gradient(operator, *args, **kwargs):
    features = randn(2, 5, 24, 20).requires_grad_()
    out = operator(features, *args, **kwargs)
    (out * randn(*out.shape, seed=9)).sum().backward()
    return out.detach(), features.grad


@pytest.mark.parametrize('number', [0, 1, 40])
@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align(monkeypatch, number, aligned, sampling_ratio):
    from mmcv.ops import roi_align

    a, b = both(
        monkeypatch,
        lambda: with_gradient(
            roi_align, rois(number), (7, 5), 0.25, sampling_ratio, 'avg', aligned
        ),
    )
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('groups', [1, 2])
def test_deform_convs(monkeypatch, groups):
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    x, weight = randn(2, 4, 9, 8), randn(6, 4 // groups, 3, 3, seed=1)
    offset, mask = randn(2, 18, 9, 8, seed=2), rand(2, 9, 9, 8, seed=3)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, offset, mask, weight)]
        x_, offset_, mask_, weight_ = leaves
        plain = deform_conv2d(x_, offset_, weight_, 1, 1, 1, groups, 1)
        modulated = modulated_deform_conv2d(
            x_, offset_, mask_, weight_, None, 1, 1, 1, groups, 1
        )
        (plain.square().sum() + modulated.square().sum()).backward()
        return [plain.detach(), modulated.detach(), *(leaf.grad for leaf in leaves)]

    for a, b in zip(*both(monkeypatch, run)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_mask_rcnn(monkeypatch):
    from pathlib import Path

    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    root = Path(__file__).parents[2]
    path = 'configs/mmdet/mask-rcnn_clustr-t_fpn_1x_coco.py'
    config = Config.fromfile(root / path)
    init_default_scope('mmdet')
    config.model.test_cfg.rcnn.score_thr = 0.0
    torch.manual_seed(0)
    model = MODELS.build(config.model).eval()
    shapes = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    shape = dict.fromkeys(shapes, (96, 128)) | dict(scale_factor=(1.0, 1.0))

    def run():
        with torch.no_grad():
            (sample,) = model(
                randn(1, 3, 96, 128), [DetDataSample(metainfo=shape)], mode='predict'
            )
        found = sample.pred_instances
        return found.bboxes, found.scores, found.labels, found.masks

    a, b = both(monkeypatch, run)
    assert len(a[0])
    for x, y in zip(a[:2], b[:2]):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-3)
    assert torch.equal(a[2], b[2])
    assert (a[3] == b[3]).float().mean() > 0.999
