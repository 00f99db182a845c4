"""Clusters, weights and attention of a backbone, what loads one, and the figure."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.model import ImgDataPreprocessor
from naive import naive_dpc_knn
from PIL import Image
from torch import nn

from clustr_mm import ClusTR
from clustr_mm.visualization import (
    ClusterMap,
    Pixels,
    clustered_attention,
    compute_clusters,
    compute_maps,
    draw_clusters,
    draw_figure,
    evaluating,
    load_backbone,
    read_image,
    resize_image,
    resize_labels,
    token_at,
)

ARCH = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[2, 2, 1, 1],
    depths=[1, 2, 1, 1],
    sr_ratios=[8, 4, 2, 1],
)
SIZE = (75, 90)
WINDOWS = dict(type='DPCKNN', window=24)
YELLOW = (255, 225, 0)


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


def make_picture(height=SIZE[0], width=SIZE[1]):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return pixels.astype(np.uint8)


def count_pixels(figure, colour):
    return int((figure == colour).all(axis=-1).sum())


# What is computed.


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('block', [0, 1])
def test_labels_are_those_that_the_attention_went_to(block, shared):
    backbone, used = make_backbone(share_clusters=shared, drop_rate=0.5).train(), []
    clusterer = backbone.stages[1].blocks[0].attn.clusterer
    handle = clusterer.register_forward_hook(lambda *call: used.append(call[2]))
    with evaluating(backbone):
        backbone(make_images(2))
    handle.remove()
    expected = used[0 if shared else block].labels
    for scale in (0, 1):
        labels = compute_clusters(backbone, make_images(2), 1, block, scale)
        assert labels.shape == (2, 10, 12)
        assert torch.equal(labels.flatten(1), expected[scale])
        found = compute_maps(backbone, make_images(2)[:1], [1], block)[scale]
        assert torch.equal(found.labels, labels[0])
        assert (found.block, found.scale, found.stride) == (block, scale, 8)
    if not shared:
        assert not torch.equal(used[0].labels[0], used[1].labels[0])


class Backwards(nn.Module):
    """As many clusters as tokens, the last token in the first one."""

    def forward(self, tokens, hw, counts):
        labels = torch.arange(tokens.shape[1]).flip(0)[None]
        return (labels, labels), (tokens.shape[1],) * 2


@pytest.mark.parametrize(
    'clusterer', [None, WINDOWS, dict(type='GridCells'), dict(type=Backwards)]
)
@pytest.mark.parametrize('stage', [0, 1, 2])
def test_map_times_values_is_the_attention(stage, clusterer):
    backbone, calls = make_backbone(clusterer=clusterer), []
    module = clustered_attention(backbone, stage)
    handle = module.register_forward_hook(lambda _, x, y: calls.append((*x[:2], y)))
    for point in [(0.5, 0.5), (61.5, 30.5), (89.5, 74.5)]:
        maps = compute_maps(backbone, make_images(), [stage], point=point)
        tokens, hw, output = calls[0]
        query, total = token_at(point, SIZE, hw), 0
        for found, kv in zip(maps, (module.kv1, module.kv2), strict=True):
            seen = found.attention.flatten(1)
            assert torch.allclose(seen.sum(dim=1), torch.ones(()), atol=1e-5)
            values = kv(tokens[0]).chunk(2, dim=-1)[1].unflatten(1, (len(seen), -1))
            total = total + torch.einsum('hn,nhd->hd', seen, values)
        result = module.proj(total.flatten())
        # The 1e-6 below the sums of the merge weights is not in the maps.
        assert torch.allclose(result, output[0, query], atol=1e-3)
        # Not because all queries had one output.
        assert not torch.allclose(result, output[0, query - 1], atol=1e-2)
    handle.remove()


@pytest.mark.parametrize('bias', [0, -300, 300])
@pytest.mark.parametrize('kind', ['DPCKNN', 'KMeans', 'GridCells'])
def test_shares_of_each_cluster_sum_to_1(kind, bias):
    backbone = make_backbone(clusterer=dict(type=kind))
    for stage in backbone.stages[:3]:
        stage.blocks[-1].attn.importance.bias.data.fill_(bias)
    maps = compute_maps(backbone, make_images())
    assert [m.stage for m in maps] == [0, 0, 1, 1, 2, 2]
    for found in maps:
        assert (found.centres is None) == (kind != 'DPCKNN')
        assert found.attention is None and found.labels.max() < found.num_clusters
        for label in found.labels.unique():
            inside = found.labels == label
            assert found.shares[inside].sum() == pytest.approx(1, abs=1e-5)
            assert found.relative_weights[inside].mean() == pytest.approx(1, abs=1e-5)
    assert bias > 0 or maps[0].relative_weights.max() > 1.5


@pytest.mark.parametrize(('stage', 'clusterer'), [(1, None), (0, WINDOWS)])
def test_centres_are_those_of_the_definition(stage, clusterer):
    backbone, calls = make_backbone(clusterer=clusterer), []
    module = clustered_attention(backbone, stage)
    module.register_forward_pre_hook(lambda _, x: calls.append(x))
    maps = compute_maps(backbone, make_images(), [stage])
    tokens, (h, w) = calls[0][:2]
    side = 24 // 4 if clusterer else 1000
    for found, wanted in zip(maps, module.cluster_counts(h * w), strict=True):
        expected = torch.zeros(h, w, dtype=torch.bool)
        for rows in np.array_split(np.arange(h), -(-h // side)):
            for columns in np.array_split(np.arange(w), -(-w // side)):
                part = tokens.unflatten(1, (h, w))[:, rows][:, :, columns]
                number = len(rows) * len(columns)
                (ranks,) = naive_dpc_knn(part.reshape(1, number, -1), [number])
                count = max(1, wanted * number // (h * w))
                place = np.ix_(rows, columns)
                expected[place] = (ranks < count).view(len(rows), len(columns))
        assert torch.equal(found.centres, expected)
        assert found.labels[found.centres].unique().numel() == found.num_clusters


def test_nothing_is_left_changed():
    backbone = make_backbone(drop_rate=0.5, frozen_stages=0).train()
    backbone.stages[1].blocks[0].eval()
    modes = [module.training for module in backbone.modules()]
    state = torch.get_rng_state()
    first, second = (compute_maps(backbone, make_images()) for _ in range(2))
    assert all(torch.equal(a.shares, b.shares) for a, b in zip(first, second))
    with pytest.raises(ZeroDivisionError), evaluating(backbone):
        assert not backbone.training and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert [module.training for module in backbone.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_pre_hooks for m in backbone.modules())


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(image=make_images(2)), 'image must have shape (1, C, H, W), got (2, 3,'),
        (dict(stages=[3]), 'stage must be one of [0, 1, 2], the stages with clusters'),
        (dict(block=1), 'block must be from -1 to 0 in stage 0, got 1'),
        (dict(point=(90, 2)), 'the point 90, 2 is outside the image of 90 x 75 pixels'),
        (dict(point=(0, -0.5)), 'the point 0, -0.5 is outside the image of 90 x 75'),
    ],
)
def test_no_such_maps(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compute_maps(make_backbone(), **{'image': make_images(), **change})


def test_no_such_scale():
    with pytest.raises(ValueError, match=r'scale must be 0 \(coarse\) or 1 .*, got 2'):
        compute_clusters(make_backbone(), make_images(), 0, scale=2)


# What is loaded.


@pytest.mark.parametrize('rgb', [True, False])
def test_pixels_are_those_of_the_preprocessor(rgb):
    cfg = dict(mean=[120.0, 115.0, 100.0], std=[58.0, 57.0, 50.0], bgr_to_rgb=rgb)
    picture, model = make_picture(), nn.Module()
    model.data_preprocessor = ImgDataPreprocessor(**cfg)
    blue_first = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)
    expected = model.data_preprocessor(dict(inputs=[blue_first]))['inputs']
    for pixels in (
        Pixels.of_model(nn.Sequential(model)),
        Pixels.of_config(dict(model=dict(data_preprocessor=cfg))),
        Pixels.of_config(dict(model=dict(type='X'), data_preprocessor=cfg)),
        Pixels.of_config(dict(data_preprocessor=dict(data_preprocessor=cfg))),
    ):
        assert torch.equal(pixels.normalise(picture), expected)
        assert np.array_equal(pixels.restore(expected[0]), picture)
    assert Pixels.of_config({}) == Pixels() == Pixels.of_model(nn.Module())
    grey = Pixels().restore(torch.randn(4, 5, 6))
    assert grey.shape == (5, 6, 3) and (grey[..., :1] == grey).all()


def save(path, backbone):
    weights = {f'backbone.{k}': v for k, v in backbone.state_dict().items()}
    torch.save(dict(state_dict={**weights, 'head.weight': torch.ones(1)}), path)
    return path


def test_backbone_of_a_config(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(
        f'model = dict(detector=[dict(net=dict(type="ClusTR", arch={ARCH},'
        'init_cfg=dict(type="Pretrained", checkpoint="none.pth")))],'
        'data_preprocessor=dict(mean=[1, 2, 3], std=[4, 5, 6]))'
    )
    state = torch.get_rng_state()
    backbone, pixels = load_backbone(path, clusterer=WINDOWS)
    assert torch.equal(state, torch.get_rng_state()) and not backbone.training
    assert backbone.stages[0].blocks[0].attn.clusterer.window == 24
    assert pixels == Pixels((1, 2, 3), (4, 5, 6), rgb=False)
    again = load_backbone(str(path))[0].state_dict()
    assert all(torch.equal(v, again[k]) for k, v in backbone.state_dict().items())

    weights = save(tmp_path / 'weights.pth', make_backbone())
    loaded = load_backbone(path, weights)[0].state_dict()
    for key, value in make_backbone().state_dict().items():
        assert torch.equal(loaded[key], value)
    save(weights, ClusTR({**ARCH, 'depths': [2, 2, 1, 1]}))
    with pytest.raises(ValueError, match=r'of more blocks: stages\.0\.blocks\.1'):
        load_backbone(path, weights)


def test_files_that_cannot_be(tmp_path):
    config, path = tmp_path / 'one.py', tmp_path / 'file'
    for load in (load_backbone, read_image, lambda file: load_backbone(None, file)):
        with pytest.raises(ValueError, match="there is no .*'.*file'"):
            load(path)
    path.write_text('not one')
    with pytest.raises(ValueError, match='cannot read the picture .*file: '):
        read_image(path)
    for text, message in [
        ('model = dict(backbone=dict(type="ResNet"))', 'has no ClusTR backbone'),
        ('model = ', 'cannot read the config .*: '),
        ('model = dict(type="ClusTR", arch="x")', 'one.py: .*arch must be one of'),
    ]:
        config.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            load_backbone(config)
        assert '\n' not in str(caught.value)


def test_pictures_stand_upright_and_get_their_size(tmp_path):
    image = Image.fromarray(make_picture())
    exif = image.getexif()
    exif[0x0112] = 6  # the camera lay on its side
    image.save(tmp_path / 'a.png', exif=exif)
    picture = read_image(str(tmp_path / 'a.png'))
    assert np.array_equal(picture, np.rot90(make_picture(), -1))
    assert resize_image(picture, 180).shape == (180, 150, 3)
    assert resize_image(picture, 180, enlarge=False) is picture
    assert resize_image(picture[:1], 9, enlarge=False).shape == (1, 9, 3)


# What is drawn.


def test_clusters_have_their_mean_colour_and_borders_only_between_them():
    picture, labels = make_picture(32, 48), torch.arange(24).reshape(4, 6) // 5
    drawn = draw_clusters(picture, labels, opacity=1)
    full = resize_labels(labels, 32, 48)
    for y in range(32):
        for x in range(48):
            right = x + 1 < 48 and full[y, x] != full[y, x + 1]
            below = y + 1 < 32 and full[y, x] != full[y + 1, x]
            expected = picture[full == full[y, x]].mean(axis=0)
            if right or below:
                expected = 255
            assert np.abs(drawn[y, x] - expected).max() <= 0.5
    assert np.array_equal(draw_clusters(picture, labels, 0, 0), picture)
    half = draw_clusters(picture, labels, 0.5, 0)
    whole = draw_clusters(picture, labels, 1, 0)
    assert np.abs(half - (picture + whole.astype(float)) / 2).max() <= 1


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(image=np.zeros((4, 4, 3))), 'image must be uint8 of shape (H, W, 3)'),
        (dict(labels=np.zeros((1, 2, 2), int)), 'labels must be integers of shape'),
        (dict(labels=torch.zeros(2, 2)), 'labels must be integers of shape (h, w)'),
        (dict(labels=np.array([[0, -1]])), 'labels must not be negative, got -1'),
        (dict(opacity=1.5), 'opacity must be in [0, 1], got 1.5'),
    ],
)
def test_bad_drawing(change, message):
    arguments = dict(image=np.zeros((4, 4, 3), np.uint8), labels=np.zeros((2, 2), int))
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_clusters(**{**arguments, **change})


def find_picture(figure, picture):
    """Rows and columns at which a picture stands in a figure, pixel for pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(figure, picture.shape)[:, :, 0]
    places = np.argwhere((windows[:, :, 0, 0] == picture[0, 0]).all(axis=-1))
    return [(y, x) for y, x in places if (windows[y, x] == picture).all()]


@pytest.mark.parametrize(
    ('h', 'w', 'longer'), [(20, 24, 96), (5, 6, 96), (20, 24, 480)]
)
def test_figure(h, w, longer):
    """Exact pictures, centres at every size of tokens, and no empty space."""
    picture = make_picture(80, 96)
    labels = (torch.arange(w) // 3).expand(h, w)
    centres = torch.zeros(h, w, dtype=torch.bool)
    centres[h // 2, ::3] = True
    place = dict(stage=0, block=0, stride=4, num_clusters=w // 3, labels=labels)
    shares = torch.full((h, w), 1 / (3 * h))
    maps = [
        ClusterMap(**place, scale=i, shares=shares, centres=centres) for i in (0, 1)
    ]
    figure = draw_figure(picture, maps, r'a$\frac$', longer=longer)
    (place,) = find_picture(figure, resize_image(picture, longer))
    assert place[0] < 0.4 * len(figure) if longer > 96 else place[0] < 140
    # Three pixels at least of each centre are plain yellow, in both scales.
    assert count_pixels(figure, YELLOW) >= 3 * 2 * (w // 3)
    # Pictures fill the row: hardly a white pixel but in the gaps.
    row = figure[place[0] + 10]
    assert longer == 96 or (row < 250).any(axis=-1).mean() > 0.9

    without = [ClusterMap(**{**vars(m), 'centres': None}) for m in maps]
    figure = draw_figure(picture, without, 'title', longer=longer)
    assert count_pixels(figure, YELLOW) == 0
    drawn = draw_clusters(
        resize_image(picture, longer), labels, border=0.5 if longer / w < 8 else 0.8
    )
    assert len(find_picture(figure, drawn)) == 2


def test_a_map_that_tells_nothing_says_so():
    picture = np.full((80, 96, 3), 100, np.uint8)
    labels = torch.arange(30).view(5, 6)
    place = dict(stage=2, block=0, stride=16, num_clusters=30, labels=labels)
    found = ClusterMap(**place, scale=0, shares=torch.ones(5, 6), centres=labels >= 0)
    assert found.is_trivial
    figure = draw_figure(picture, [found, found], 'title', longer=96)
    assert count_pixels(figure, YELLOW) == 0
    (top, left), *_ = find_picture(figure, picture)
    beside = figure[top : top + 80, left + 216 : left + 216 + 96]
    note = (beside != 100).any(axis=-1)
    assert 500 < note.sum() < 0.7 * note.size  # words, and the picture around them


def test_the_mark_is_at_the_point_and_leaves_it_free():
    point = (61.5, 30.5)
    maps = compute_maps(make_backbone(), make_images(), [1], point=point)
    picture = np.full((*SIZE, 3), 100, np.uint8)
    for longer in (90, 180):
        figure = draw_figure(picture, maps, '', point=point, longer=longer)
        ys, xs = np.nonzero((figure == (90, 255, 90)).all(axis=-1))
        first = xs < 16 + longer
        x, y = np.array(point) * longer / 90
        assert xs[first].mean() == pytest.approx(16 + x, abs=1.5)
        middle = round(ys.mean()), round(16 + x)
        assert tuple(figure[middle]) == (100, 100, 100)
        assert ys.max() - ys.min() < 30


@pytest.mark.parametrize('name', ['matplotlib', 'skimage'])
def test_missing_libraries(monkeypatch, name):
    for module in [m for m in sys.modules if m.split('.')[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'clustr_mm\[tools\]'"):
        draw_clusters(make_picture(), np.zeros((2, 2), int))


def test_nothing_is_imported_before_it_draws():
    code = (
        'import sys, clustr_mm\n'
        'from mmengine.registry import HOOKS\n'
        'assert "ClusterVisualizationHook" in HOOKS.module_dict\n'
        'heavy = {"cv2", "PIL", "matplotlib", "skimage", "mmengine.hooks"}\n'
        'assert not heavy & set(sys.modules), heavy & set(sys.modules)\n'
        'import numpy, clustr_mm.visualization as vis\n'
        'assert not {"matplotlib", "skimage"} & set(sys.modules)\n'
        'vis.draw_clusters(numpy.zeros((4, 4, 3), "uint8"), numpy.zeros((2, 2), int))\n'
        'assert "matplotlib.figure" in sys.modules\n'
        'assert "matplotlib.pyplot" not in sys.modules\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
