import re

import numpy as np
import pytest
import torch

from clustr_mm import ClusTR
from clustr_mm.models.clustr import ClusteredAttention
from clustr_mm.visualization import (
    clustered_attention,
    compute_clusters,
    draw_clusters,
    find_borders,
    record_clusters,
    resize_labels,
)


@pytest.fixture(scope='module')
def backbone():
    torch.manual_seed(0)
    return ClusTR('tiny').eval()


@pytest.fixture(scope='module')
def images():
    return torch.randn(2, 3, 64, 90, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ('stage', 'scale', 'shape', 'count'),
    [
        (0, 0, (2, 16, 23), 16 * 23 // 64),
        (0, 1, (2, 16, 23), 16 * 23 // 64 * 4),
        (1, 0, (2, 8, 12), 96 // 16),
        (2, 0, (2, 4, 6), 24 // 4),
        (2, 1, (2, 4, 6), 24),
    ],
)
def test_shapes_and_counts(backbone, images, stage, scale, shape, count):
    labels = compute_clusters(backbone, images, stage, scale=scale)
    assert labels.dtype == torch.int64 and labels.shape == shape
    for label in labels:
        assert label.unique().tolist() == list(range(count))


@pytest.mark.parametrize('scale', [0, 1])
@pytest.mark.parametrize('block', [0, 1])
def test_labels_are_those_of_the_attention(backbone, images, monkeypatch, block, scale):
    used = []

    def spy(self, *args):
        used.append((self, cluster(self, *args)))
        return used[-1][1]

    cluster = ClusteredAttention.cluster
    monkeypatch.setattr(ClusteredAttention, 'cluster', spy)
    labels = compute_clusters(backbone, images, 1, block, scale)
    attention = backbone.stages[1].blocks[block].attn
    # What the attention itself used comes first, the recording second.
    expected, _ = [result for module, result in used if module is attention]
    assert torch.equal(labels.flatten(1), expected.labels[scale])
    assert not any(
        torch.equal(labels.flatten(1), other.labels[scale])
        for module, other in used
        if module is not attention
    )


def test_each_pass_is_recorded_until_the_end(backbone, images):
    with torch.no_grad():
        plain = backbone(images)
        with record_clusters(backbone, stage=0) as labels:
            watched = backbone(images)
            backbone(images[:1, :, :32, :32])
        backbone(images)
    assert [tuple(label.shape) for label in labels] == [(2, 16, 23), (1, 8, 8)]
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert not clustered_attention(backbone, 0)._forward_hooks


def test_hook_is_removed_on_error(backbone):
    with pytest.raises(ZeroDivisionError), record_clusters(backbone, stage=0):
        raise ZeroDivisionError
    assert not clustered_attention(backbone, 0)._forward_hooks


def test_training_mode_is_kept(images):
    torch.manual_seed(0)
    backbone = ClusTR('tiny', drop_rate=0.5).train()
    first = compute_clusters(backbone, images, 2)
    assert torch.equal(first, compute_clusters(backbone, images, 2))
    assert backbone.training
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(stage=3), 'stage must be one of [0, 1, 2], the stages with clusters'),
        (dict(stage=-1), 'stage must be one of [0, 1, 2], the stages with clusters'),
        (dict(stage=1, block=2), 'block must be from -2 to 1 in stage 1, got 2'),
        (dict(stage=0, scale=2), 'scale must be 0 (coarse) or 1 (fine), got 2'),
    ],
)
def test_no_such_clusters(backbone, images, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compute_clusters(backbone, images, **arguments)


def test_resize_labels():
    labels = torch.tensor([[0, 1], [2, 3]])
    even = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    assert np.array_equal(resize_labels(labels, 4, 4), even)
    assert np.array_equal(resize_labels(labels.numpy(), 4, 4), even)
    assert resize_labels(labels, 3, 5).tolist() == [
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 1],
        [2, 2, 2, 3, 3],
    ]
    for wrong in (labels.float(), labels[None]):
        with pytest.raises(ValueError, match='labels must be integers of shape'):
            resize_labels(wrong, 4, 4)


def test_borders_are_where_labels_change():
    labels = np.random.default_rng(0).integers(0, 2, (9, 12))
    borders = find_borders(labels)
    for y in range(9):
        for x in range(12):
            right = x + 1 < 12 and labels[y, x] != labels[y, x + 1]
            below = y + 1 < 9 and labels[y, x] != labels[y + 1, x]
            assert borders[y, x] == (right or below)
    assert not find_borders(np.zeros((4, 4), int)).any()


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)


@pytest.mark.parametrize('colours', ['mean', 'distinct'])
def test_draw_clusters(picture, colours):
    labels = np.arange(4 * 6).reshape(4, 6) // 5
    original = picture.copy()
    drawn = draw_clusters(picture, labels, colours, opacity=1, border=(1, 2, 3))
    assert drawn.shape == picture.shape and drawn.dtype == np.uint8
    assert np.array_equal(picture, original)

    full = resize_labels(labels, 32, 48)
    borders = find_borders(full)
    assert (drawn[borders] == (1, 2, 3)).all()
    tints = []
    for label in range(labels.max() + 1):
        inside = (full == label) & ~borders
        tints.append(tuple(drawn[inside][0]))
        assert (drawn[inside] == tints[-1]).all()
        if colours == 'mean':
            mean = picture[full == label].mean(axis=0)
            assert np.abs(mean - tints[-1]).max() <= 0.5
    assert len(set(tints)) == len(tints)


def test_opacity_and_no_border(picture):
    labels = torch.arange(24).reshape(4, 6)
    assert np.array_equal(
        draw_clusters(picture, labels, opacity=0, border=None), picture
    )
    tint = draw_clusters(picture, labels, opacity=1, border=None).astype(float)
    half = draw_clusters(picture, labels, opacity=0.5, border=None)
    assert np.abs(half - (picture + tint) / 2).max() <= 1


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(image=np.zeros((4, 4, 3))), 'image must be uint8 of shape (H, W, 3)'),
        (dict(image=np.zeros((4, 4), np.uint8)), 'got uint8 of shape (4, 4)'),
        (dict(labels=np.array([[0, -1]])), 'labels must not be negative, got -1'),
        (dict(colours='pink'), "colours must be 'mean' or 'distinct', got 'pink'"),
        (dict(opacity=1.5), 'opacity must be in [0, 1], got 1.5'),
    ],
)
def test_bad_drawing(change, message):
    arguments = dict(image=np.zeros((4, 4, 3), np.uint8), labels=np.zeros((2, 2), int))
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_clusters(**{**arguments, **change})
