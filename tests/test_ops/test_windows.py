import pytest
import torch

from clustr_mm import ClusTR
from clustr_mm.ops import dpc_knn, window_dpc_knn, windows


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def counts_of(sr):
    def cluster_counts(n):
        coarse = max(1, n // sr**2)
        return coarse, min(4 * coarse, n)

    return cluster_counts


def pieces(length, window):
    """Sides of the windows: as few as possible, as equal as possible."""
    parts = -(-length // window)
    return [len(piece) for piece in torch.arange(length).tensor_split(parts)]


@pytest.mark.parametrize('window', [1, 2, 5, 7, 8, 13, 14, 30])
@pytest.mark.parametrize('hw', [(14, 14), (9, 23), (1, 20), (30, 1)])
def test_each_window_by_itself(hw, window):
    tokens = randn(2, hw[0] * hw[1], 16)
    labels, totals = window_dpc_knn(tokens, hw, window, counts_of(2))
    maps = [label.view(2, *hw) for label in labels]
    token_map = tokens.view(2, *hw, 16)

    seen = [set(), set()]
    y = 0
    for h in pieces(hw[0], window):
        x = 0
        for w in pieces(hw[1], window):
            assert h <= window and w <= window
            part = token_map[:, y : y + h, x : x + w].reshape(2, h * w, 16)
            wanted = counts_of(2)(h * w)
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
        assert seen[scale] == set(range(totals[scale]))


@pytest.mark.parametrize('window', [None, 12, 100])
def test_one_window_is_the_whole_map(window):
    tokens = randn(2, 120, 16)
    labels, totals = window_dpc_knn(tokens, (10, 12), window, counts_of(4))
    assert totals == (7, 28)
    for label, expected in zip(labels, dpc_knn(tokens, (7, 28))):
        assert torch.equal(label, expected)


def test_counts_in_any_order():
    tokens = randn(2, 12, 16)
    labels, totals = window_dpc_knn(tokens, (3, 4), None, lambda n: (n, 3, n, 5))
    assert totals == (12, 3, 12, 5)
    own = torch.arange(12).expand(2, -1)
    for label, expected in zip(labels, (own, *dpc_knn(tokens, [3]), own)):
        assert torch.equal(label, expected)
    assert torch.equal(labels[3], dpc_knn(tokens, [5])[0])


def test_clustering_sees_one_window_at_a_time(monkeypatch):
    shapes = []

    def spy(tokens, counts, k):
        shapes.append(tuple(tokens.shape))
        return dpc_knn(tokens, counts, k)

    monkeypatch.setattr(windows, 'dpc_knn', spy)
    window_dpc_knn(randn(2, 15 * 20, 8), (15, 20), 8, counts_of(2))
    # 15 = 8 + 7, 20 = 7 + 7 + 6, two images.
    assert sorted(shapes) == sorted(
        [(2 * 2, 56, 8), (2, 48, 8), (2 * 2, 49, 8), (2, 42, 8)]
    )


@pytest.mark.parametrize('window', [0, -3])
def test_wrong_window(window):
    with pytest.raises(ValueError, match=f'window.*got {window}'):
        window_dpc_knn(randn(1, 16, 4), (4, 4), window, counts_of(2))


# ---- in the backbone


def models(cluster_window, **kwargs):
    torch.manual_seed(0)
    exact = ClusTR('tiny', **kwargs).eval()
    windowed = ClusTR('tiny', cluster_window=cluster_window, **kwargs).eval()
    windowed.load_state_dict(exact.state_dict())
    return exact, windowed


def test_window_is_given_in_pixels():
    _, model = models(224)
    attn = [stage.blocks[0].attn for stage in model.stages[:3]]
    assert [module.window for module in attn] == [56, 28, 14]


@pytest.mark.parametrize('size', [(64, 64), (40, 64), (1, 1)])
def test_bit_equal_where_the_image_fits(size):
    exact, windowed = models(64)
    x = randn(2, 3, *size)
    with torch.no_grad():
        for a, b in zip(exact(x), windowed(x)):
            assert torch.equal(a, b)


@pytest.mark.parametrize('cluster_window', [1, 3, 32, 50, 64])
@pytest.mark.parametrize('size', [(96, 130), (33, 65), (5, 200)])
def test_any_window_and_size(cluster_window, size):
    exact, windowed = models(cluster_window)
    x = randn(1, 3, *size)
    with torch.no_grad():
        expected, outs = exact(x), windowed(x)
    for a, b in zip(expected, outs):
        assert a.shape == b.shape and b.isfinite().all()
    assert not torch.equal(expected[0], outs[0])


def test_windowed_attention_attends_to_all_windows():
    torch.manual_seed(0)
    model = ClusTR('tiny', cluster_window=32, drop_path_rate=0.0).eval()
    attn = model.stages[0].blocks[0].attn
    x = randn(1, 16 * 16, 64)
    merged = attn.merge(x, (16, 16))
    # Four windows of 8 x 8 tokens, each with 1 and 4 clusters.
    assert [m.shape[1] for m in merged] == [4, 16]
    changed = x.clone()
    changed[:, -1] += 10  # in the last window
    with torch.no_grad():
        difference = attn(changed, (16, 16)) - attn(x, (16, 16))
    assert (difference[:, 0].abs() > 0).any()  # seen from the first


def test_every_parameter_gets_a_gradient():
    model = ClusTR('tiny', cluster_window=32, drop_path_rate=0.0).train()
    sum(out.square().mean() for out in model(randn(1, 3, 64, 96))).backward()
    assert all(param.grad.isfinite().all() for param in model.parameters())
