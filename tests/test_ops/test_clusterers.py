"""Windows, k-means and the grid, and the clusterer as a component."""

import copy

import pytest
import torch
from mmengine.registry import MODELS
from naive import randn
from torch import nn

from clustr_mm import ClusTR
from clustr_mm.ops import (
    DPCKNN,
    GridCells,
    KMeans,
    SortedTokens,
    dpc_knn,
    grid_cells,
    kmeans,
)
from clustr_mm.ops.kmeans import grid_shapes

# ---- DPC-kNN in windows


def pieces(length, window):
    """Sides of the windows: as few as possible, as equal as possible."""
    parts = -(-length // window)
    return [len(piece) for piece in torch.arange(length).tensor_split(parts)]


@pytest.mark.parametrize('window', [1, 2, 5, 7, 8, 13, 14, 30])
@pytest.mark.parametrize('hw', [(14, 14), (9, 23), (1, 20), (30, 1)])
def test_each_window_by_itself(hw, window):
    length = hw[0] * hw[1]
    tokens = randn(2, length, 16)
    counts = (max(1, length // 4), length)
    found = DPCKNN(window=window)(tokens, hw, counts)
    maps = [label.view(2, *hw) for label in found.labels]
    token_map = tokens.view(2, *hw, 16)

    seen = [set(), set()]
    y = 0
    for h in pieces(hw[0], window):
        x = 0
        for w in pieces(hw[1], window):
            assert h <= window and w <= window
            part = token_map[:, y : y + h, x : x + w].reshape(2, h * w, 16)
            wanted = [max(1, count * h * w // length) for count in counts]
            for scale, expected in enumerate(dpc_knn(part, wanted)):
                got = maps[scale][:, y : y + h, x : x + w].reshape(2, h * w)
                own = set(got.flatten().tolist())
                assert len(own) == wanted[scale]
                # No cluster reaches into another window.
                assert not own & seen[scale]
                seen[scale] |= own
                if wanted[scale] < h * w:
                    assert torch.equal(got - got.min(), expected)
            x += w
        y += h
    for scale in range(2):
        assert seen[scale] == set(range(found.counts[scale]))


@pytest.mark.parametrize('window', [None, 12, 100])
def test_one_window_is_the_whole_map(window):
    tokens = randn(2, 120, 16)
    found = DPCKNN(window=window)(tokens, (10, 12), (7, 28))
    assert found.counts == (7, 28)
    for label, expected in zip(found.labels, dpc_knn(tokens, (7, 28))):
        assert torch.equal(label, expected)


def test_as_many_clusters_as_tokens_come_in_their_order():
    found = DPCKNN()(randn(2, 12, 16), (3, 4), (12, 3))
    assert torch.equal(found.labels[0], torch.arange(12).expand(2, -1))
    assert torch.equal(found.labels[1], dpc_knn(randn(2, 12, 16), [3])[0])


def test_windows_of_one_size_form_a_batch():
    shapes = []

    class Spy(DPCKNN):
        def find(self, tokens, counts):
            shapes.append(tuple(tokens.shape))
            return super().find(tokens, counts)

    Spy(window=8)(randn(2, 15 * 20, 8), (15, 20), (75, 300))
    # 15 = 8 + 7, 20 = 7 + 7 + 6, two images.
    assert sorted(shapes) == sorted(
        [(2 * 2, 56, 8), (2, 48, 8), (2 * 2, 49, 8), (2, 42, 8)]
    )


# ---- the grid


@pytest.mark.parametrize(
    ('hw', 'counts', 'shapes'),
    [
        ((128, 128), (49, 196), [(7, 7), (14, 14)]),
        ((200, 336), (49, 196), [(6, 8), (12, 16)]),
        ((200, 336), (1050, 4200), [(25, 42), (50, 84)]),
        ((1, 1), (1, 1), [(1, 1), (1, 1)]),
        ((1, 20), (5, 20), [(1, 5), (1, 10)]),
        ((5, 7), (8, 32), [(2, 4), (4, 7)]),
    ],
)
def test_grid_shapes(hw, counts, shapes):
    assert grid_shapes(hw, counts) == shapes


def test_grid_cells():
    labels, counts = grid_cells(torch.zeros(1, 12, 1), (2, 6), (2, 8))
    assert counts == (2, 8)
    assert labels[0].view(2, 6).tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert labels[1].view(2, 6)[1].tolist() == [4, 4, 5, 6, 6, 7]


# ---- k-means


def plain_kmeans(points, weights, means, steps):
    """The definition of one image, by loops."""
    for _ in range(steps):
        labels = torch.tensor(
            [int((means - x).square().sum(1).argmin()) for x in points]
        )
        means = means.clone()
        for m in range(len(means)):
            mine = labels == m
            if mine.any():
                weight = weights[mine, None]
                means[m] = (points[mine] * weight).sum(0) / weight.sum()
    return labels, means


@pytest.mark.parametrize('hw', [(12, 16), (9, 9), (1, 30), (6, 7)])
@pytest.mark.parametrize('steps', [1, 2, 5])
def test_kmeans_by_definition(hw, steps):
    tokens = randn(2, hw[0] * hw[1], 5) + 3
    asked = (hw[0] * hw[1] // 16 + 1, hw[0] * hw[1] // 4)
    labels, counts, means = kmeans(tokens, hw, asked, steps)
    coarse, fine = grid_shapes(hw, asked)
    for b in range(2):
        points = tokens[b].double()
        maps = points.T.view(1, 5, *hw)
        cells = nn.functional.adaptive_avg_pool2d(maps, fine).flatten(2)[0].T
        label, mean = plain_kmeans(points, torch.ones(len(points)), cells, steps)
        assert torch.equal(labels[1][b], label)
        torch.testing.assert_close(means[1][b], mean.float(), rtol=1e-5, atol=1e-5)

        sizes = label.bincount(minlength=counts[1]).double()
        grid = torch.cat([mean * sizes[:, None], sizes[:, None]], dim=1)
        grid = grid.T.view(1, 6, *fine)
        cells = nn.functional.adaptive_avg_pool2d(grid, coarse).flatten(2)[0].T
        start = cells[:, :-1] / cells[:, -1:]
        of_fine, mean = plain_kmeans(mean, sizes, start, steps)
        assert torch.equal(labels[0][b], of_fine[label])
        torch.testing.assert_close(means[0][b], mean.float(), rtol=1e-5, atol=1e-5)


def test_a_cluster_without_tokens_keeps_its_mean():
    # Two values in alternate rows: the cells all begin with their middle.
    tokens = torch.tensor([0.0, 4.0]).repeat_interleave(8).repeat(4).view(1, 64, 1)
    labels, counts, means = kmeans(tokens, (8, 8), (4, 16), steps=1)
    # All tie, so the first cluster takes everything; the others keep what they had.
    assert not labels[0].any() and not labels[1].any()
    torch.testing.assert_close(means[1], torch.full((1, 16, 1), 2.0))

    torch.manual_seed(0)
    model = ClusTR('tiny', clusterer=dict(type='KMeans', steps=1))
    attn = model.stages[0].blocks[0].attn
    x = randn(1, 1, 64).expand(1, 256, 64)
    clusters = attn.cluster(x, (16, 16))
    assert not clusters.labels[1].any()
    merged = attn.merge(x, clusters)[1]
    torch.testing.assert_close(merged, x[:, :16])


def test_ties_go_to_the_lower_number():
    tokens = torch.tensor([0.0, 2.0, 1.0, 1.0]).view(1, 4, 1)
    labels, _, _ = kmeans(tokens, (1, 4), (2,), steps=1)
    # Both cells have the mean 1.
    assert not labels[0].any()


@pytest.mark.parametrize(
    'clusterer', [KMeans(), GridCells(), SortedTokens(), DPCKNN(), DPCKNN(5, 6)]
)
def test_repeats_whatever_the_batch_layout_and_autocast(clusterer):
    tokens = randn(3, 120, 16).requires_grad_()
    found = clusterer(tokens, (10, 12), (7, 28))
    variants = [
        clusterer(tokens, (10, 12), (7, 28)),
        clusterer(tokens.transpose(1, 2).contiguous().mT, (10, 12), (7, 28)),
    ]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        variants.append(clusterer(tokens, (10, 12), (7, 28)))
    for other in variants:
        for a, b in zip(found.labels, other.labels):
            assert torch.equal(a, b) and not a.requires_grad
    alone = clusterer(tokens[1:2], (10, 12), (7, 28))
    for a, b in zip(found.labels, alone.labels):
        assert torch.equal(a[1:2], b)


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
def test_kmeans_takes_what_is_not_finite_for_zero(value):
    tokens, broken = randn(1, 64, 8), randn(1, 64, 8)
    broken[0, ::3, 2], broken[0, 9] = value, value
    tokens[0, ::3, 2], tokens[0, 9] = 0, 0
    got, want = (kmeans(x, (8, 8), (4, 16)) for x in (broken, tokens))
    for a, b in zip(got[0], want[0]):
        assert torch.equal(a, b)
    assert all(mean.isfinite().all() for mean in got[2])
    huge = kmeans(torch.full((1, 64, 8), 3e38), (8, 8), (4, 16))
    assert all(mean.isfinite().all() for mean in huge[2])


def test_kmeans_in_blocks(monkeypatch):
    from clustr_mm.ops import search

    tokens = randn(3, 400, 16)
    whole = kmeans(tokens, (20, 20), (25, 100))
    sizes = []
    real = torch.baddbmm

    def spy(*args, **kwargs):
        out = real(*args, **kwargs)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch, 'baddbmm', spy)
    monkeypatch.setitem(search.BLOCK_ELEMENTS, 'cpu', 3000)
    for a, b in zip(whole[0], kmeans(tokens, (20, 20), (25, 100))[0]):
        assert torch.equal(a, b)
    assert sizes and max(sizes) <= 3000


# ---- as a component


@MODELS.register_module()
class EveryOther:
    """A class of a user's own."""

    def __call__(self, tokens, hw, counts):
        index = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        return tuple(index % 2 for _ in counts), tuple(2 for _ in counts)


def test_a_clusterer_of_ones_own():
    model = ClusTR('tiny', clusterer=dict(type='EveryOther')).eval()
    attn = model.stages[0].blocks[0].attn
    x = randn(1, 64, 64)
    merged = attn.merge(x, attn.cluster(x, (8, 8)))
    assert [m.shape for m in merged] == [(1, 2, 64)] * 2
    with torch.no_grad():
        assert all(out.isfinite().all() for out in model(randn(2, 3, 40, 56)))


def test_window_is_given_in_pixels():
    model = ClusTR('tiny', clusterer=dict(type='DPCKNN', k=3, window=224))
    found = [stage.blocks[0].attn.clusterer for stage in model.stages[:3]]
    assert [(c.k, c.window, c.stride) for c in found] == [
        *((3, 224, 4), (3, 224, 8), (3, 224, 16))
    ]
    shapes = []
    clusterer = copy.copy(found[1])
    clusterer.find = lambda tokens, counts: (
        shapes.append(tokens.shape) or dpc_knn(tokens, counts)
    )
    clusterer(randn(1, 28 * 56, 8), (28, 56), (98, 392))
    assert shapes == [(2, 28 * 28, 8)]


def test_windowed_attention_attends_to_all_windows():
    torch.manual_seed(0)
    model = ClusTR('tiny', clusterer=dict(type='DPCKNN', window=32)).eval()
    attn = model.stages[0].blocks[0].attn
    x = randn(1, 16 * 16, 64)
    # Four windows of 8 x 8 tokens, each with 1 and 4 clusters.
    assert attn.cluster(x, (16, 16)).counts == (4, 16)
    changed = x.clone()
    changed[:, -1] += 10  # in the last window
    with torch.no_grad():
        difference = attn(changed, (16, 16)) - attn(x, (16, 16))
    assert (difference[:, 0].abs() > 0).any()  # seen from the first


@pytest.mark.parametrize('size', [(64, 64), (40, 64), (1, 1)])
def test_windows_change_nothing_where_the_image_fits(size):
    torch.manual_seed(0)
    exact = ClusTR('tiny').eval()
    windowed = ClusTR('tiny', clusterer=dict(type='DPCKNN', window=64)).eval()
    windowed.load_state_dict(exact.state_dict())
    x = randn(2, 3, *size)
    with torch.no_grad():
        for a, b in zip(exact(x), windowed(x)):
            assert torch.equal(a, b)


@pytest.mark.parametrize('most', [1, 3, 49])
def test_max_clusters(most):
    model = ClusTR('tiny', clusterer=dict(type='KMeans'), max_clusters=most)
    for stage, side in zip(model.stages[:3], (64, 32, 16)):
        attn = stage.blocks[0].attn
        x = randn(1, side * side, attn.q.in_features)
        coarse, fine = attn.cluster(x, (side, side)).counts
        assert coarse <= most and fine <= 4 * most
        if most == 49:
            assert (coarse, fine) == (49, 196)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(max_clusters=0), 'max_clusters.*got 0'),
        (dict(max_clusters='49'), "max_clusters.*got '49'"),
        (dict(clusterer='KMeans'), "clusterer.*got 'KMeans'"),
        (dict(clusterer=dict(steps=3)), "clusterer.*'type'"),
        (dict(clusterer=dict(type='DPCKNN', k=0)), 'k must.*got 0'),
        (dict(clusterer=dict(type='DPCKNN', k=2.5)), r'k must.*got 2\.5'),
        (dict(clusterer=dict(type='DPCKNN', k='5')), "k must.*got '5'"),
        (dict(clusterer=dict(type='DPCKNN', window=0)), 'window must.*got 0'),
        (dict(clusterer=dict(type='DPCKNN', window=1.5)), 'window must.*got 1.5'),
        (dict(clusterer=dict(type='KMeans', steps=0)), 'steps must.*got 0'),
        (
            dict(clusterer=dict(type='DPCKNN', window=224), max_clusters=49),
            'max_clusters=49.*KMeans',
        ),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ClusTR('tiny', **kwargs)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('num_neighbors', r"'num_neighbors'.*type='DPCKNN', k="),
        ('cluster_window', r"'cluster_window'.*type='DPCKNN', window="),
        ('depth', "'depth'.*_delete_=True"),
    ],
)
def test_arguments_that_are_no_more(name, message):
    with pytest.raises(TypeError, match=message):
        ClusTR('tiny', **{name: 5})


@pytest.mark.parametrize(
    ('tokens', 'hw', 'counts', 'message'),
    [
        (torch.zeros(1, 12, 2), (3, 5), (1, 4), r'map of 12 tokens, got \(3, 5\)'),
        (torch.zeros(1, 12, 2), (3, 4), (4, 1), r'rise, got \[4, 1\]'),
        (torch.zeros(1, 12, 2), (3, 4), (1, 13), 'from 1 to N = 12'),
        (torch.zeros(12, 2), (3, 4), (1, 4), r'\(B, N, C\)'),
    ],
)
@pytest.mark.parametrize('function', [grid_cells, kmeans])
def test_wrong_maps(function, tokens, hw, counts, message):
    with pytest.raises(ValueError, match=message):
        function(tokens, hw, counts)
