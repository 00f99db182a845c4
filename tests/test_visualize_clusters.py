"""Attention maps, the sheet of pictures, its tool, and the hook of trainings."""

import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.model import BaseModel, ImgDataPreprocessor, MMDistributedDataParallel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from naive import naive_dpc_knn
from PIL import Image
from torch import nn

from clustr_mm import ClusTR
from clustr_mm.visualization import (
    Line,
    Pixels,
    attention_maps,
    cluster_shares,
    clustered_attention,
    compute_clusters,
    compute_maps,
    draw_dots,
    draw_heat,
    draw_point,
    draw_sheet,
    evaluating,
    find_clustr,
    load_backbone,
    read_image,
    resize_image,
    resize_labels,
    stretch,
    token_at,
)
from clustr_mm.visualization import hook as hook_module
from clustr_mm.visualization import sheet as sheet_module
from clustr_mm.visualization.hook import ClusterVisualizationHook
from clustr_mm.visualization.sheet import ALARM, MARGIN

ROOT = Path(__file__).resolve().parents[1]
ARCH = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[2, 2, 1, 1],
    depths=[1, 2, 1, 1],
    sr_ratios=[8, 4, 2, 1],
)
SIZE = (75, 90)


def make_backbone(**kwargs):
    """Weights large enough for attention and merging that are far from even."""
    torch.manual_seed(0)
    backbone = ClusTR(ARCH, **kwargs).eval()
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.4)
            nn.init.normal_(module.bias, std=0.2)
    return backbone


def make_images(batch=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *SIZE, generator=generator)


@pytest.fixture(scope='module')
def backbone():
    return make_backbone()


@pytest.fixture(scope='module')
def images():
    return make_images()


@pytest.fixture(scope='module')
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3))
    return pixels.astype(np.uint8)


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location(
        'visualize_clusters', ROOT / 'tools/visualize_clusters.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_attention(backbone, images, stage, block=-1):
    """The attention module of a block, what it gets, and what it returns."""
    module = clustered_attention(backbone, stage, block)
    calls = []
    handle = module.register_forward_hook(lambda _, x, y: calls.append((*x, y)))
    with torch.no_grad():
        backbone(images)
    handle.remove()
    return (module, *calls[0])


# The maps themselves.


@pytest.mark.parametrize('window', [None, 24])
@pytest.mark.parametrize('stage', [0, 1, 2])
def test_map_times_values_is_the_attention(stage, window):
    backbone = make_backbone(clusterer=dict(type='DPCKNN', window=window))
    module, tokens, hw, output = run_attention(backbone, make_images(2), stage)
    for query in (0, tokens.shape[1] // 2, tokens.shape[1] - 1):
        with torch.no_grad():
            maps = attention_maps(module, tokens, hw, query)
            total = 0
            for seen, kv in zip(maps, (module.kv1, module.kv2), strict=True):
                assert seen.shape == (2, module.num_heads, tokens.shape[1])
                assert seen.dtype == torch.float32 and seen.min() >= 0
                assert torch.allclose(seen.sum(-1), torch.ones(()), atol=1e-5)
                values = kv(tokens).chunk(2, dim=-1)[1]
                values = values.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
                total = total + (seen.unsqueeze(-1) * values).sum(dim=2)
            result = module.proj(total.flatten(1))
        # The 1e-6 below the sums of the merge weights is not in the maps.
        assert torch.allclose(result, output[:, query], atol=1e-3)
        # Not because all queries had one output.
        other = (query + 1) % tokens.shape[1]
        assert not torch.allclose(result, output[:, other], atol=1e-2)


def test_there_is_no_such_query(backbone, images):
    module, tokens, hw, _ = run_attention(backbone, images, 2)
    for query in (-1, tokens.shape[1]):
        with pytest.raises(ValueError, match=f'from 0 to .*, got {query}'):
            attention_maps(module, tokens, hw, query)


@pytest.mark.parametrize('bias', [0, -300, 300])
def test_shares_of_each_cluster_sum_to_1(bias):
    torch.manual_seed(0)
    module = make_backbone().stages[0].blocks[0].attn
    module.importance.bias.data.fill_(bias)
    tokens, labels = torch.randn(2, 30, 8), torch.arange(60).view(2, 30) % 7
    with torch.no_grad():
        shares = cluster_shares(module, tokens, labels, 7)
        weights = module.importance(tokens).double().clamp(max=60).exp().squeeze(-1)
    for b in range(2):
        for m in range(7):
            mine = labels[b] == m
            expected = weights[b, mine] / weights[b, mine].sum()
            assert shares[b, mine].sum() == pytest.approx(1, abs=1e-5)
            assert torch.allclose(shares[b, mine].double(), expected, atol=1e-4)


def test_a_point_is_in_the_token_that_is_drawn_there():
    hw, size = (5, 7), (18, 26)
    drawn = resize_labels(np.arange(35).reshape(hw), *size)
    for y in range(size[0]):
        for x in range(size[1]):
            for corner in (0, 0.5):
                assert token_at((x + corner, y + corner), size, hw) == drawn[y, x]


@pytest.mark.parametrize('point', [(-1, 0), (0, -0.5), (26, 0), (0, 18)])
def test_a_point_outside(point):
    message = f'the point {point[0]:g}, {point[1]:g} is outside the image of 26 x 18'
    with pytest.raises(ValueError, match=re.escape(message)):
        token_at(point, (18, 26), (5, 7))


@pytest.mark.parametrize('window', [None, 24])
def test_maps(window, images):
    backbone = make_backbone(clusterer=dict(type='DPCKNN', window=window))
    point = (61.5, 30.5)
    maps = compute_maps(backbone, images, point=point)
    places = [(m.stage, m.block, m.scale, m.stride) for m in maps]
    assert places == [
        *((0, 0, 0, 4), (0, 0, 1, 4)),
        *((1, 1, 0, 8), (1, 1, 1, 8)),
        *((2, 0, 0, 16), (2, 0, 1, 16)),
    ]
    for found in maps:
        labels = compute_clusters(backbone, images, found.stage, scale=found.scale)
        assert torch.equal(found.labels, labels[0])
        assert found.labels.unique().tolist() == list(range(found.num_clusters))
        module, tokens, hw, _ = run_attention(backbone, images, found.stage)
        query = token_at(point, SIZE, hw)
        with torch.no_grad():
            seen = attention_maps(module, tokens, hw, query)[found.scale][0]
        assert torch.equal(found.attention, seen.unflatten(1, hw))
        # The mean of the weights over each cluster is 1.
        relative = found.relative_weights
        for label in range(found.num_clusters):
            inside = relative[found.labels == label]
            assert inside.mean() == pytest.approx(1, abs=1e-5)
        assert found.is_trivial == (found.num_clusters == found.labels.numel())
        if found.is_trivial:
            assert torch.allclose(relative, torch.ones(()))
        elif found.scale == 0:
            assert relative.max() > 1.5
    assert compute_maps(backbone, images, [1], 0)[0].attention is None


@pytest.mark.parametrize(('stage', 'window'), [(1, None), (0, 24), (1, 24)])
def test_centres_are_those_of_the_definition(stage, window, images):
    backbone = make_backbone(clusterer=dict(type='DPCKNN', window=window))
    module, tokens, (h, w), _ = run_attention(backbone, images, stage)
    maps = compute_maps(backbone, images, [stage])
    side = window and window // module.clusterer.stride or 1000
    counts = module.cluster_counts(h * w)
    for found in maps:
        expected = torch.zeros(h, w, dtype=torch.bool)
        token_map = tokens.unflatten(1, (h, w))
        for rows in np.array_split(np.arange(h), -(-h // side)):
            for columns in np.array_split(np.arange(w), -(-w // side)):
                part = token_map[0, rows][:, columns]
                number = part.shape[0] * part.shape[1]
                count = max(1, counts[found.scale] * number // (h * w))
                (ranks,) = naive_dpc_knn(part.reshape(1, number, -1), [number])
                centres = (ranks < count).view(part.shape[:2])
                expected[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = centres
        assert torch.equal(found.centres, expected)
        assert found.labels[found.centres].unique().numel() == found.num_clusters


def test_maps_leave_no_trace(images):
    backbone = make_backbone(drop_rate=0.5, frozen_stages=0).train()
    backbone.stages[1].blocks[0].eval()
    modes = [module.training for module in backbone.modules()]
    state = torch.get_rng_state()
    first, second = (compute_maps(backbone, images) for _ in range(2))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(first, second))
    assert [module.training for module in backbone.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_pre_hooks for m in backbone.modules())
    assert len(set(modes)) == 2
    with pytest.raises(ZeroDivisionError), evaluating(backbone):
        assert not backbone.training and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert [module.training for module in backbone.modules()] == modes


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(image=make_images(2)), 'image must have shape (1, C, H, W), got (2, 3,'),
        (dict(stages=[3]), 'stage must be one of [0, 1, 2]'),
        (dict(block=1), 'block must be from -1 to 0 in stage 0, got 1'),
        (dict(point=(90, 2)), 'the point 90, 2 is outside the image of 90 x 75 pixels'),
    ],
)
def test_no_such_maps(backbone, images, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compute_maps(backbone, **{**dict(image=images), **change})
    assert not any(m._forward_pre_hooks for m in backbone.modules())


# Pixels.


@pytest.mark.parametrize('rgb', [True, False])
def test_pixels_are_those_of_the_preprocessor(picture, rgb):
    cfg = dict(mean=[120.0, 115.0, 100.0], std=[58.0, 57.0, 50.0], bgr_to_rgb=rgb)
    preprocessor = ImgDataPreprocessor(**cfg)
    blue_first = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)
    expected = preprocessor(dict(inputs=[blue_first]))['inputs']

    model = nn.Module()
    model.data_preprocessor = preprocessor
    for pixels in (
        Pixels.of_model(nn.Sequential(model)),
        Pixels.of_config(dict(model=dict(data_preprocessor=cfg))),
        Pixels.of_config(dict(model=dict(type='X'), data_preprocessor=cfg)),
        Pixels.of_config(dict(data_preprocessor=dict(data_preprocessor=cfg))),
    ):
        assert torch.equal(pixels.normalise(picture), expected)
        assert np.array_equal(pixels.restore(expected[0]), picture)


def test_pixels_without_normalisation(picture):
    assert Pixels.of_config(dict(model=dict(data_preprocessor=dict()))) == Pixels()
    assert Pixels.of_config({}) == Pixels()
    model = nn.Module()
    assert Pixels.of_model(model) is None
    model.data_preprocessor = ImgDataPreprocessor()
    assert Pixels.of_model(model) is None


def test_inputs_that_are_no_pictures():
    inputs = torch.linspace(-3, 5, 2 * 4 * 6).view(2, 4, 6)
    grey = stretch(inputs)
    assert grey.shape == (4, 6, 3) and grey.min() == 0 and (grey[..., :1] == grey).all()
    three = stretch(torch.linspace(-3, 5, 72).view(3, 4, 6))
    assert (three.min(), three.max()) == (0, 255)
    assert stretch(torch.full((3, 2, 2), float('nan'))).shape == (2, 2, 3)
    assert stretch(torch.zeros(3, 2, 2)).max() == 0


# What is loaded.


def test_backbone_of_a_config():
    path = ROOT / 'configs/mmdet/mask-rcnn_clustr-t-w224_fpn_1x_coco.py'
    backbone, pixels = load_backbone(path)
    assert backbone.arch_settings == ClusTR.arch_zoo['tiny']
    assert backbone.stages[0].blocks[0].attn.clusterer.window == 224
    assert pixels == Pixels() and not backbone.training


def test_backbone_of_other_configs(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(
        f'model = dict(detector=[dict(net=dict(type="ClusTR", arch={ARCH},'
        'init_cfg=dict(type="Pretrained", checkpoint="none.pth")))],'
        'data_preprocessor=dict(mean=[1, 2, 3], std=[4, 5, 6]))'
    )
    backbone, pixels = load_backbone(path, clusterer=dict(type='DPCKNN', window=48))
    assert backbone.stages[0].blocks[0].attn.clusterer.window == 48
    assert pixels == Pixels((1, 2, 3), (4, 5, 6), rgb=False)
    path.write_text(f'model = dict(type="ClusTR", arch={ARCH})')
    assert load_backbone(str(path))[0].arch_settings == ARCH


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'small.py'
    path.write_text(f'model = dict(backbone=dict(type="ClusTR", arch={ARCH}))')
    return path


def save(path, backbone, prefix='backbone.'):
    weights = {prefix + k: v for k, v in backbone.state_dict().items()}
    torch.save(dict(state_dict={**weights, 'head.weight': torch.ones(1)}), path)
    return path


def test_weights(tmp_path, config):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (load_backbone(config)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(state, torch.get_rng_state())
    expected = make_backbone()
    loaded, _ = load_backbone(config, save(tmp_path / 'weights.pth', expected))
    for key, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_weights_that_do_not_fit(tmp_path, config):
    larger = {**ARCH, 'depths': [2, 2, 1, 1]}
    path = save(tmp_path / 'weights.pth', ClusTR(larger))
    with pytest.raises(ValueError, match=r'of more blocks: stages\.0\.blocks\.1'):
        load_backbone(config, path)
    # As the public code has it.
    weights = torch.load(save(path, make_backbone()), weights_only=True)
    weights['state_dict']['block2.2.norm1.weight'] = torch.ones(1)
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r'of more blocks: stages\.1\.blocks\.2'):
        load_backbone(config, path)
    # Stages that the config leaves out are no harm.
    config.write_text(config.read_text().replace('arch=', 'out_indices=(0, 1), arch='))
    with pytest.raises(ValueError, match=r'of more blocks: stages\.1\.blocks\.2'):
        load_backbone(config, path)
    weights['state_dict'].pop('block2.2.norm1.weight')
    torch.save(weights, path)
    assert len(load_backbone(config, path)[0].stages) == 2


class Evil:
    def __reduce__(self):
        return exec, ('raise SystemExit("ran")',)


def test_files_that_cannot_be(tmp_path, config):
    missing = tmp_path / 'missing'
    with pytest.raises(ValueError, match="there is no checkpoint '.*missing'"):
        load_backbone(config, missing)
    with pytest.raises(ValueError, match="there is no config '.*missing'"):
        load_backbone(missing)
    with pytest.raises(ValueError, match="there is no picture '.*missing'"):
        read_image(missing)
    missing.write_text('not one')
    with pytest.raises(ValueError, match='cannot read the picture .*missing: '):
        read_image(missing)
    with pytest.raises(ValueError, match='missing: cannot be read as a checkpoint: '):
        load_backbone(config, missing)
    torch.save(dict(state_dict={}, evil=Evil()), missing)
    with pytest.raises(ValueError, match='missing: cannot be read as .*exec'):
        load_backbone(config, missing)
    for text, message in [
        ('model = dict(backbone=dict(type="ResNet"))', 'has no ClusTR backbone'),
        ('model = ', 'cannot read the config .*: '),
        ('model = dict(type="ClusTR", arch="x")', 'one.py: .*arch must be one of'),
    ]:
        (tmp_path / 'one.py').write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            load_backbone(tmp_path / 'one.py')
        assert '\n' not in str(caught.value)


def test_pictures_stand_upright(tmp_path, picture):
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera lay on its side
    image.save(tmp_path / 'a.png', exif=exif)
    expected = np.rot90(picture, -1)
    assert np.array_equal(read_image(str(tmp_path / 'a.png')), expected)


# Drawing.


def test_heat(picture):
    values = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 9.0]])
    drawn = draw_heat(picture, values, 1, 4, 'gray', opacity=1)
    ends = np.array([0, 0, 85, 170, 255, 255])
    shades = ends[resize_labels(np.arange(6).reshape(2, 3), *SIZE)]
    assert np.abs(drawn - shades[..., None].astype(float)).max() <= 1
    grey = draw_heat(picture, values, 1, 4, opacity=0)
    assert (grey == grey[..., :1]).all() and grey.std() > 10
    with pytest.raises(ValueError, match='low must be below high, got 2 and 2'):
        draw_heat(picture, values, 2, 2)
    with pytest.raises(ValueError, match='opacity must be in'):
        draw_heat(picture, values, 1, 2, opacity=2)
    with pytest.raises(ValueError, match='image must be uint8'):
        draw_heat(picture / 2, values, 1, 2)


@pytest.mark.parametrize(('hw', 'extent'), [((3, 4), 25), ((25, 30), 1)])
def test_dots_stand_in_the_middle_of_tokens(hw, extent):
    tokens = torch.zeros(hw, dtype=torch.bool)
    tokens[0, 0] = tokens[2, 3] = True
    blank = np.full((*SIZE, 3), 100, np.uint8)
    drawn = draw_dots(blank, tokens, (9, 8, 7))
    changed = (drawn != 100).any(axis=-1)
    numbers = resize_labels(np.arange(hw[0] * hw[1]).reshape(hw), *SIZE)
    for token in (0, 2 * hw[1] + 3):
        inside = numbers == token
        assert (changed & inside).sum() == extent
        ys, xs = np.nonzero(inside & (drawn == (9, 8, 7)).all(axis=-1))
        centre = np.argwhere(inside).mean(axis=0)
        assert np.abs(np.array([ys.mean(), xs.mean()]) - centre).max() <= 0.75
    assert changed.sum() == 2 * extent and (blank == 100).all()


def test_a_mark_leaves_the_point_free():
    blank = np.full((*SIZE, 3), 100, np.uint8)
    drawn = draw_point(blank, 40.5, 30.5)
    ys, xs = np.nonzero((drawn != 100).any(axis=-1))
    assert (ys.mean(), xs.mean()) == pytest.approx((30, 40))
    assert (drawn[28:33, 38:43] == 100).all() and (blank == 100).all()
    draw_point(blank, 0, 74)


def test_resize_image(picture):
    assert resize_image(picture, 180).shape == (150, 180, 3)
    assert resize_image(picture, 180, enlarge=False) is picture
    assert resize_image(picture, 45, enlarge=False).shape == (38, 45, 3)
    assert resize_image(picture[:1], 9).shape == (1, 9, 3)


@pytest.mark.parametrize('shape', [(60, 90), (90, 20), (3, 40)])
def test_nothing_on_the_sheet_overlaps(shape):
    """Each picture has a colour of its own, all of which must be seen."""
    pictures = [np.full((*shape, 3), (0, 200, shade), np.uint8) for shade in range(7)]
    rows = [
        sheet_module.Row('Title', pictures[1:4], ['a' * 50, 'b', 'c']),
        sheet_module.Row('A very long title ' * 9, pictures[4:], ['d', 'e' * 30, 'f']),
    ]
    bar = sheet_module.Bar('gray', ('0', 'a very long end of the bar'), 'text')
    lines = [Line('A title', 18, True), Line('long ' * 30), *[Line('more')] * 9]
    sheet = sheet_module._compose(pictures[0], lines, bar, rows)
    for shade in range(7):
        seen = (sheet == (0, 200, shade)).all(axis=-1)
        assert seen.sum() == shape[0] * shape[1]
    # Nor do captions run into each other.
    second = np.nonzero((sheet == (0, 200, 2)).all(axis=-1))[1].min()
    assert second > MARGIN + Line(rows[0].captions[0]).width
    margin = np.ones(sheet.shape[:2], bool)
    margin[MARGIN:-MARGIN, MARGIN:-MARGIN] = False
    assert (sheet[margin] == 255).all()
    # All text is there: each line makes the sheet larger.
    taller = sheet_module._compose(pictures[0], [*lines, Line('x')] * 3, bar, rows)
    assert taller.shape[0] > sheet.shape[0]


def test_sheet(backbone, picture, images, monkeypatch):
    """What is drawn of what, up to the layout."""
    composed = []
    compose = sheet_module._compose

    def spy(*args):
        composed.append(args)
        return compose(*args)

    monkeypatch.setattr(sheet_module, '_compose', spy)
    maps = compute_maps(backbone, images)
    sheet = draw_sheet(picture, maps, [Line('name')], longer=90)
    first, lines, bar, rows = composed[0]
    assert sheet.dtype == np.uint8 and np.array_equal(first, picture)
    assert lines[0] == Line('name')
    assert [row.title for row in rows] == [
        'Stage 1 (stages.0.blocks.0): stride 4, 23 × 19 = 437 tokens',
        'Stage 2 (stages.1.blocks.1): stride 8, 12 × 10 = 120 tokens',
        'Stage 3 (stages.2.blocks.0): stride 16, 6 × 5 = 30 tokens',
    ]
    assert rows[0].captions == [
        *('coarse: 6 clusters', 'weights in coarse clusters'),
        *('fine: 24 clusters', 'weights in fine clusters'),
    ]
    assert rows[2].captions[2:] == ['fine: 28 clusters', 'weights in fine clusters']
    end = float(bar.ticks[-1])
    expected = draw_heat(
        picture, maps[0].relative_weights.log(), -np.log(end), np.log(end), 'RdBu_r'
    )
    assert np.array_equal(rows[0].pictures[1], expected)
    logs = maps[0].relative_weights.log().abs()
    assert (logs <= np.log(end)).float().mean() > 0.95

    point = (61.5, 30.5)
    maps = compute_maps(backbone, images, point=point)
    draw_sheet(picture, maps, [], point, longer=90)
    first, _, bar, rows = composed[1]
    assert np.array_equal(first, draw_point(picture, *point))
    heat = maps[3].attention.mean(dim=0) * 120
    top = max(4, float(heat.max()))
    assert rows[1].captions[3] == f'attention: 0 to {top:.3g} × mean'
    expected = draw_heat(picture, heat.sqrt(), 0, top**0.5)
    assert np.array_equal(rows[1].pictures[3], draw_point(expected, *point))

    # The mark goes along when the pictures are enlarged.
    draw_sheet(picture, maps, [], point, longer=180)
    large = resize_image(picture, 180)
    assert np.array_equal(composed[2][0], draw_point(large, 2 * 61.5, 2 * 30.5))


# The tool.


@pytest.fixture
def photo(tmp_path, picture):
    path = tmp_path / 'photo.png'
    Image.fromarray(picture).save(path)
    return path


def run(tool, capsys, *arguments):
    status = tool.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def has_alarm(path):
    return (np.array(Image.open(path)) == ALARM).all(axis=-1).any()


def test_tool(tool, tmp_path, config, photo, capsys):
    options = ('--config', config, '--device', 'cpu', '--panel', 90, '--out')
    out = tmp_path / 'a/b'
    status, lines, errors = run(tool, capsys, photo, *options, out)
    target = out / 'photo_clusters.png'
    assert status == 0 and not errors
    assert re.fullmatch(rf'\[1/1\] wrote {target}, took [\d.]+ s', lines[0])
    assert has_alarm(target)  # that the weights are random
    weights = save(tmp_path / 'weights.pth', make_backbone())
    trained = tmp_path / 'trained.png'
    arguments = (photo, '--checkpoint', weights, *options, trained)
    assert run(tool, capsys, *arguments)[0] == 0
    assert not has_alarm(trained)

    seen = tmp_path / 'seen'
    point = ('--point', 61, 30)
    assert run(tool, capsys, photo, *point, *options, seen)[0] == 0
    assert [path.name for path in seen.iterdir()] == ['photo_attention.png']
    options = (photo, '--block', 1, '--size', 40, *options)
    status, _, _ = run(tool, capsys, *options, tmp_path / 'block.png')
    # One stage has two blocks.
    sizes = [Image.open(p).height for p in (tmp_path / 'block.png', target)]
    assert status == 0 and sizes[0] < sizes[1] - 2 * 75


def test_point_of_a_shrunk_picture(tool, config, photo, monkeypatch, capsys, tmp_path):
    """The middle of the pixel, to scale."""
    calls = []

    def spy(backbone, inputs, stages, block, point):
        calls.append((tuple(inputs.shape), point))
        return compute_maps(backbone, inputs, stages, block, point)

    monkeypatch.setattr(tool, 'compute_maps', spy)
    options = ('--config', config, '--device', 'cpu', '--size', 45)
    arguments = (photo, '--point', 89, 0, *options, '--out', tmp_path)
    assert run(tool, capsys, *arguments)[0] == 0
    (shape, point), *_ = calls
    assert shape == (1, 3, 38, 45)
    assert point == pytest.approx((89.5 / 2, 0.5 * 38 / 75))


def test_many_pictures(tool, tmp_path, config, photo, picture, capsys):
    (tmp_path / 'broken.jpg').write_text('no')
    other = tmp_path / 'other/photo.jpg'
    other.parent.mkdir()
    Image.fromarray(picture[:20]).save(other)
    out = tmp_path / 'out'
    names = [tmp_path / 'gone.jpg', photo, tmp_path / 'broken.jpg', other]
    options = ('--config', config, '--device', 'cpu', '--panel', 64, '--out', out)
    status, lines, errors = run(tool, capsys, *names, *options)
    assert status == 1
    assert [line[:11] for line in lines] == ['[2/4] wrote', '[4/4] wrote']
    assert errors[0] == f'[1/4] there is no picture {str(names[0])!r}'
    assert errors[1].startswith(f'[3/4] cannot read the picture {names[2]}: ')
    assert errors[2:] == ['2 of 4 failed']
    found = sorted(path.name for path in out.iterdir())
    assert found == ['photo_clusters.png', 'photo_clusters_2.png']

    # The point is in one of the two.
    arguments = (photo, other, '--point', 5, 50, *options)
    status, lines, errors = run(tool, capsys, *arguments)
    assert status == 1 and len(lines) == 1
    message = f'[2/2] {other}: the point 5, 50 is outside the image of 90 x 20 pixels'
    assert errors[0] == message


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--block', '2'), '--block must be first, last or up to 1 here, got 2'),
        (('--block', '-1'), "--block must be first, last or a number from 0, got '-1'"),
        (('--block', 'x'), "--block must be first, last or a number from 0, got 'x'"),
        (('--size', '0'), '--size must be at least 1, got 0'),
        (('--cluster-window', '0'), '--cluster-window must be at least 1, got 0'),
        (('--panel', '9'), '--panel must be at least 32, got 9'),
        (('--arch', 'tiny'), '--arch goes without --config, which says it'),
        (('--device', 'x'), '--device x cannot be used here: '),
        (('--checkpoint', 'gone.pth'), "there is no checkpoint 'gone.pth'"),
        (('--out', 'photo.png'), '--out would replace the picture photo.png'),
        (('b.png', '--out', 'c.png'), '--out must be a folder for many pictures, got'),
        (('--point', '1', 'x'), "argument --point: invalid int value: 'x'"),
    ],
)
def test_bad_arguments(tool, config, photo, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(photo.parent)
    before = photo.read_bytes()
    with pytest.raises(SystemExit) as caught:
        run(tool, capsys, 'photo.png', '--config', config, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert line.startswith(f'visualize_clusters.py: {message}')
    assert photo.read_bytes() == before


# The hook.


class Model(BaseModel):
    """A loss on everything the backbone returns."""

    def __init__(self, backbone=None, data_preprocessor=None):
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = backbone

    def forward(self, inputs, data_samples=None, mode='tensor'):
        outs = self.backbone(inputs)
        return dict(loss=sum(out.square().mean() for out in outs))


def make_model():
    cfg = dict(mean=[120.0, 115.0, 100.0], std=[58.0, 57.0, 50.0], bgr_to_rgb=True)
    backbone = make_backbone(drop_rate=0.3, drop_path_rate=0.3, frozen_stages=0)
    return Model(backbone, ImgDataPreprocessor(**cfg))


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        shape = (3, 40, 56)
        image = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return dict(inputs=image)


def train(folder, name, hooks):
    model = make_model()
    runner = Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=2,
            dataset=Data(),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        custom_hooks=hooks,
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
        randomness=dict(seed=0),
        experiment_name=name,
        log_level='WARNING',
    )
    runner.train()
    modes = [module.training for module in model.modules()]
    return runner, model, modes


def test_training_is_the_same_with_the_hook(tmp_path, monkeypatch):
    drawn = []

    def spy(image, *args, **kwargs):
        drawn.append(image)
        return draw_sheet(image, *args, **kwargs)

    monkeypatch.setattr(hook_module, 'draw_sheet', spy)
    cfg = dict(type='ClusterVisualizationHook', interval=2, size=64)
    results = {}
    for name, hooks in [('without', []), ('with', [cfg])]:
        folder = tmp_path / name
        runner, model, modes = train(folder, f'{tmp_path.name}_{name}', hooks)
        states = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
        results[name] = (model.state_dict(), modes, states)
        files = sorted(path.name for path in folder.rglob('train_clusters*'))
        expected = ['train_clusters_2.png', 'train_clusters_4.png'] if hooks else []
        assert files == expected
        assert not model.backbone._forward_pre_hooks

    (weights, modes, states), (others, other_modes, other_states) = results.values()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    start = make_model().state_dict()
    assert not all(torch.equal(weights[key], start[key]) for key in weights)
    assert modes == other_modes and len(set(modes)) == 2
    assert torch.equal(states[0], other_states[0])
    assert np.array_equal(states[1], other_states[1]) and states[2] == other_states[2]
    # The first image of the second and of the fourth batch of two.
    for image, index in zip(drawn, (2, 6), strict=True):
        expected = Data()[index]['inputs'].flip(0).permute(1, 2, 0)
        assert np.array_equal(image, expected.numpy())


class Stub:
    """As much of a runner as the hook sees; calls the model itself."""

    def __init__(self, model):
        self.model = model
        self.iter = 0
        self.added = []
        self.warnings = []
        self.visualizer = SimpleNamespace(add_image=self.add)
        self.logger = SimpleNamespace(warning=self.warnings.append)

    def add(self, name, image, step):
        self.added.append((name, image, step))

    def train(self, hook, iterations=2, inputs=None):
        hook.before_train(self)
        for self.iter in range(iterations):
            hook.before_train_iter(self, self.iter)
            if inputs is not None:
                self.model(inputs, mode='loss')
            hook.after_train_iter(self, self.iter)
        hook.after_train(self)
        return self.added


@pytest.mark.parametrize('wrap', [False, True])
def test_hook_in_a_wrapped_model(tmp_path, wrap):
    model = make_model()
    inputs = make_images(2)[..., :40, :40]
    hook = ClusterVisualizationHook(interval=1, stages=[1], block=0, size=40, name='n')
    if wrap:
        store = dist.FileStore(str(tmp_path / 'store'), 1)
        dist.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        if wrap:
            model = MMDistributedDataParallel(model, find_unused_parameters=True)
        added = Stub(model).train(hook, 2, inputs)
    finally:
        if wrap:
            dist.destroy_process_group()
    assert [(name, step) for name, _, step in added] == [('n', 1), ('n', 2)]
    image = added[0][1]
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    # One row of pictures, in colours that went back through the preprocessor.
    picture = Pixels((120, 115, 100), (58, 57, 50)).restore(inputs[0])
    windows = np.lib.stride_tricks.sliding_window_view(image, picture.shape)
    assert (windows[MARGIN, MARGIN, 0] == picture).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hook_draws_only_where_it_should(monkeypatch):
    inputs = make_images(2)
    hook = ClusterVisualizationHook(draw=False, interval=1)
    assert Stub(make_model()).train(hook, 2, inputs) == []
    hook = ClusterVisualizationHook(interval=3, size=32, stages=[2])
    added = Stub(make_model()).train(hook, 7, inputs)
    assert [step for *_, step in added] == [3, 6]
    # Other processes neither draw nor keep an image.
    monkeypatch.setattr(hook_module, 'is_main_process', lambda: False)
    stub = Stub(make_model())
    assert stub.train(ClusterVisualizationHook(interval=1), 2, inputs) == []
    assert not stub.warnings


def test_hook_without_images():
    stub = Stub(make_model())
    hook = ClusterVisualizationHook(interval=2)
    assert stub.train(hook, 3) == []
    name = 'ClusterVisualizationHook'
    assert stub.warnings == [f'{name}: the backbone got no image in iteration 2']


def test_hook_without_a_known_normalisation(monkeypatch):
    monkeypatch.setattr(hook_module, 'draw_sheet', lambda image, *_, **__: image)
    inputs = make_images(2)
    hook = ClusterVisualizationHook(interval=2)
    ((_, image, _),) = Stub(Model(make_backbone())).train(hook, 2, inputs)
    assert np.array_equal(image, stretch(inputs[0]))


@pytest.mark.parametrize(
    ('model', 'arguments', 'message'),
    [
        (nn.Linear(1, 1), {}, 'there is no ClusTR in this Linear'),
        (None, dict(stages=[3]), 'stage must be one of [0, 1, 2], the stages with'),
        (None, dict(block=1), 'block must be from -1 to 0 in stage 0, got 1'),
    ],
)
def test_hook_of_what_is_not_there(model, arguments, message):
    hook = ClusterVisualizationHook(**arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        hook.before_train(Stub(model or make_model()))
    # Switched off it does not matter.
    hook.draw = False
    hook.before_train(Stub(model or make_model()))


def test_hook_arguments():
    for name in ('interval', 'size'):
        with pytest.raises(ValueError, match=f'{name} must be at least 1, got 0'):
            ClusterVisualizationHook(**{name: 0})
    cfg = dict(type='ClusterVisualizationHook', interval=7, stages=(0, 1))
    hook = HOOKS.build(cfg)
    assert type(hook) is ClusterVisualizationHook and hook.draw
    assert (hook.interval, hook.stages) == (7, (0, 1))


def test_find_clustr():
    model = make_model()
    assert find_clustr(nn.Sequential(model)) is model.backbone
    assert find_clustr(model.backbone) is model.backbone


def test_the_package_alone_imports_no_pictures():
    code = (
        'import sys, clustr_mm\n'
        'from mmengine.registry import HOOKS\n'
        'assert "ClusterVisualizationHook" in HOOKS.module_dict\n'
        'heavy = {"cv2", "PIL", "matplotlib", "mmengine.runner", "mmengine.hooks"}\n'
        'assert not heavy & set(sys.modules), heavy & set(sys.modules)\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
