"""Counts of multiply-adds, against published figures and by hand."""

import json
import re
from pathlib import Path

import get_flops
import pytest
import torch
from backbones import find_backbone
from get_flops import CPU_ATTENTION, count_flops, load_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clustr_mm import ClusTR

ROOT = Path(__file__).parents[1]
PUBLISHED = dict(tiny=2.15, small=4.8, base=7.48)


@pytest.mark.parametrize('arch', PUBLISHED)
def test_published_figures(arch):
    flops = count_flops(ClusTR(arch), 224, 224)
    assert flops.published / 1e9 == pytest.approx(PUBLISHED[arch], rel=0.005)
    # Without the products of one scale they are missed.
    assert flops.layers / 1e9 == pytest.approx(PUBLISHED[arch], rel=0.045)


@pytest.mark.parametrize(
    ('size', 'layers', 'attention', 'clustering'),
    [
        ((224, 224), 4.60, 0.865, 2.41),
        ((512, 512), 24.0, 23.6, 65.8),
        ((800, 1344), 98.6, 397, 1106),
    ],
)
def test_parts_of_small(size, layers, attention, clustering):
    flops = count_flops(ClusTR('small'), *size)
    parts = (flops.layers, flops.attention, flops.clustering)
    for count, expected in zip(parts, (layers, attention, clustering)):
        assert count / 1e9 == pytest.approx(expected, rel=0.005)
    assert flops.total == sum(parts)


def test_attention_of_dual_vit():
    """By the formulas of docs/backbones.md: the semantics grow with the image."""
    model = find_backbone('dualvit-s').build()
    for side in (224, 448):
        n = [(side // stride) ** 2 for stride in (4, 8, 16, 32)]
        s = (side // 28) ** 2
        products = 64 * s**2  # of the queries and the pooled map
        for i, (dims, depth) in enumerate([(64, 3), (128, 4), (320, 6), (448, 3)]):
            pairs = 2 * n[i] * s + s**2 if i < 2 else (n[i] + s) ** 2
            products += depth * dims * pairs
        assert count_flops(model, side, side).attention == 2 * products


def test_windows_cost_less():
    whole = count_flops(ClusTR('tiny'), 512, 512)
    clusterer = dict(type='DPCKNN', window=224)
    windowed = count_flops(ClusTR('tiny', clusterer=clusterer), 512, 512)
    # 3 x 3 windows of stage 1 and 2 instead of one map.
    assert windowed.clustering < whole.clustering / 8
    assert windowed.layers == pytest.approx(whole.layers, rel=0.01)
    assert windowed.published is None


def test_linear_form():
    # Without the variants' last stage, whose attention is full.
    arch = dict(
        embed_dims=[16, 32, 48],
        num_heads=[1, 2, 3],
        mlp_ratios=[1, 1, 1],
        depths=[2, 1, 1],
        sr_ratios=[8, 4, 2],
    )

    def build(max_clusters):
        clusterer = dict(type='KMeans', steps=2)
        return ClusTR(arch, clusterer, max_clusters, out_indices=(0, 1, 2)).eval()

    linear = build(49)
    flops = count_flops(linear, 512, 512)
    blocks = [(128**2, 16), (128**2, 16), (64**2, 32), (32**2, 48)]
    m1, m2 = 49, 196
    assert flops.clustering == sum(2 * (n * m2 + m2 * m1) * c for n, c in blocks)
    # And the search itself, which is not run for the count, takes as many.
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        linear(torch.zeros(1, 3, 512, 512))
    assert counter.get_total_flops() == 2 * flops.total

    assert count_flops(linear, 1024, 1024).attention == 4 * flops.attention
    # The limit does it: k-means alone leaves the growth quadratic.
    small, large = (count_flops(build(None), side, side) for side in (512, 1024))
    assert large.attention == 16 * small.attention


@pytest.mark.parametrize(
    ('name', 'giga'), [('resnet-50', 4.09), ('swin-t', 4.5), ('pvtv2-b2', 4.0)]
)
def test_peers(name, giga):
    _, model = load_model(name)
    flops = count_flops(model, 224, 224)
    assert flops.total / 1e9 == pytest.approx(giga, rel=0.02)
    assert flops.clustering == 0 and flops.published is None


def test_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.linear = nn.Linear(4, 5)

        def forward(self, x):
            x = self.conv(x).flatten(2).transpose(1, 2)
            torch.baddbmm(torch.zeros(1, device=x.device), x, x.transpose(1, 2))
            nn.functional.scaled_dot_product_attention(x, x, x)
            return self.linear(x)

    for device_of in (lambda net: net, with_head):
        flops = count_flops(device_of(Net()), 6, 10)
        assert flops.layers == 60 * (3 * 4 * 9 + 4 * 5)
        assert flops.attention == 60 * 60 * 4 * 3


def with_head(net):
    """What makes a model be counted on the CPU."""
    net.bbox_head = nn.Identity()
    return net


def test_the_model_is_left_as_it_was():
    model = ClusTR('tiny').train()
    count_flops(model, 64, 64)
    assert model.training
    assert all(p.device.type == 'cpu' for p in model.parameters())
    # That of the copy gives out clusters without a search.
    assert 'find' not in vars(model.stages[0].blocks[0].attn.clusterer)


@pytest.mark.parametrize(
    ('config', 'parts'),
    [
        ('mmdet/mask-rcnn_clustr-t_fpn_1x_coco.py', 31.32e6),
        ('mmdet/retinanet_clustr-s_fpn_1x_coco.py', 32.41e6),
        ('mmseg/upernet_clustr-t_8xb2-160k_ade20k-512x512.py', 41.48e6),
        ('mmpose/td-hm_clustr-t_8xb64-210e_coco-wholebody-256x192.py', 14.07e6),
        ('mmpretrain/clustr-t_8xb128_in1k.py', 11_682_417),
    ],
)
def test_whole_models(config, parts):
    name, model = load_model(str(ROOT / 'configs' / config))
    _, backbone = load_model(str(ROOT / 'configs' / config), whole=False)
    whole, part = (count_flops(m, 96, 64, name) for m in (model, backbone))
    assert whole.parameters == pytest.approx(parts, rel=0.001)
    assert whole.clustering == part.clustering > 0
    assert whole.attention == part.attention
    assert whole.layers > part.layers


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('model = (', 'cannot read the config'),
        ('model = 3', 'has no model'),
        ('model = dict(backbone=3)', 'has no model'),
        ('model = dict(type="None")', 'cannot build '),
    ],
)
def test_configs_that_are_none(tmp_path, text, message):
    path = tmp_path / 'config.py'
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_model(str(path))
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='config'):
        load_model(str(path), whole=False)


def test_command_line(tmp_path, capsys):
    out = tmp_path / 'flops.json'
    get_flops.main(['small', 'resnet-50', '--shape', '224', '--out', str(out)])
    printed = capsys.readouterr().out
    cells = [re.split(' *[|] *', line)[1:-1] for line in printed.splitlines()]
    small = ['small', '224x224', '22.18', '4.60', '0.87', '2.41', '7.87', '4.78']
    assert small in cells
    assert cells[3][0] == 'resnet-50' and not cells[3][-1]
    assert 'As published: ' in printed
    small, resnet = json.loads(out.read_text())
    assert small['parameters'] == 22_177_941 and resnet['attention'] == 0


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nothing'], "unknown backbone 'nothing'"),
        (['tiny', '--shape', '0', '5'], 'at least 1 x 1, got 0 x 5'),
        (['tiny', '--shape', '1', '2', '3'], 'one or two numbers'),
        (['tiny', '--out', 'nowhere/a.json'], 'there is no folder nowhere'),
    ],
)
def test_errors_take_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        get_flops.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and error.count('\n') == 1
