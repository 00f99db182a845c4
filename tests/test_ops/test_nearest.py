"""The search behind the clustering against a plain one, position by position."""

import importlib

import pytest
import torch

nearest = importlib.import_module('clustr_mm.ops.nearest')

WAYS = ['on a CPU', 'without a look', 'by the kernel']


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param != 'on a CPU':
        monkeypatch.setattr(nearest, 'is_readable', lambda _: False)
    if request.param == 'by the kernel':
        module = pytest.importorskip('clustr_mm.ops.triton_nearest')
        if not nearest._triton_is_installed():
            pytest.skip('no Triton 3')
        if torch.cuda.is_available():
            pytest.skip('Triton compiles for the GPU here')
        monkeypatch.setattr(nearest, '_search_by_kernel', module.search)
        monkeypatch.setattr(nearest, 'has_kernel', lambda _: True)
    return request.param


def plain(tokens, k, queries, keys, limits):
    """Sort all distances of every query; (distance, position) of the first k."""
    x = tokens.double()
    images = torch.arange(len(x))[:, None]
    square = (x[images, queries][:, :, None] - x[images, keys][:, None]).square().sum(3)
    columns = torch.arange(keys.shape[1])
    square = square.masked_fill(columns >= limits[..., None], torch.inf)
    distances, positions = square.sort(dim=2, stable=True)
    return distances[..., :k], positions[..., :k]


def indices(generator, batch, length, count):
    """Different token indices for every image, in any order."""
    rows = [torch.randperm(length, generator=generator)[:count] for _ in range(batch)]
    return torch.stack(rows)


@pytest.mark.parametrize('kind', ['integers', 'far apart', 'near by'])
@pytest.mark.parametrize('num_keys', [7, 80])
@pytest.mark.parametrize('k', [1, 5])
def test_some_queries_of_some_keys(way, kind, num_keys, k):
    generator = torch.Generator().manual_seed(num_keys + k)
    tokens = torch.randn(3, 100, 6, generator=generator)
    if kind == 'integers':
        tokens = tokens.round()  # many equal distances: the first key is nearer
    elif kind == 'far apart':
        tokens = tokens * 2.0**70  # in units of the prepared tokens they are not
    else:
        if way != 'by the kernel':  # interpreted, it rounds equal columns differently
            tokens[:, 20:50] = tokens[:, :1]
        tokens = tokens + 300
    points = nearest.prepare(tokens)
    assert torch.equal(points.exact * points.scale[:, None, None], tokens.double())
    tokens = points.exact

    queries = indices(generator, 3, 100, 50)
    keys = indices(generator, 3, 100, num_keys)
    all_limits = [None]
    # Of fewer keys than it looks for, the kernel may name one twice: no harm to k = 1,
    # and nobody asks it for more.
    if k == 1 or way != 'by the kernel':
        all_limits.append(torch.randint(num_keys + 1, (3, 50), generator=generator))
        all_limits.append(torch.randint(3, (3, 50), generator=generator))
    for limits in all_limits:
        distances, positions = nearest.nearest(points, k, queries, keys, limits)
        limits = torch.full((3, 50), num_keys) if limits is None else limits
        expected = plain(tokens, k, queries, keys, limits)
        assert torch.equal(distances, expected[0])
        there = distances.isfinite()
        assert torch.equal(positions[there], expected[1][there])
        assert positions.min() >= 0 and positions.max() < num_keys


@pytest.mark.parametrize('seed', range(3))
def test_two_groups_of_close_tokens(seed):
    """Where they stand apart the origin is near neither: float32 is not enough."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randn(32, generator=generator)
    place = place * 32**0.5 / place.norm()
    groups = [place, -place]
    noise = torch.randn(2, 150, 32, generator=generator)
    tokens = torch.cat([at + 5e-3 * x for at, x in zip(groups, noise)])[None]
    points = nearest.prepare(tokens)
    every = torch.arange(300)[None]
    expected = plain(points.exact, 5, every, every, torch.full((1, 300), 300))
    for got, want in zip(nearest.nearest(points, 5), expected):
        assert torch.equal(got, want)


@pytest.mark.parametrize('copies', [40, 300])
def test_of_many_equal_keys_the_first_are_nearer(copies):
    """Also of more than ``CROWD``, of which not each is looked at."""
    generator = torch.Generator().manual_seed(copies)
    tokens = torch.randn(2, 400, 6, generator=generator)
    tokens[:, torch.randperm(400, generator=generator)[:copies]] = 0.5
    points = nearest.prepare(tokens)
    every = torch.arange(400).expand(2, -1)
    expected = plain(points.exact, 5, every, every, torch.full((2, 400), 400))
    for got, want in zip(nearest.nearest(points, 5), expected):
        assert torch.equal(got, want)


@pytest.mark.parametrize('num_keys', [5, 6, 7, 8])
def test_keys_at_nearly_one_distance(way, num_keys):
    """Their order is rounding in float32: none may be left out unseen."""
    generator = torch.Generator().manual_seed(num_keys)
    ring = torch.randn(40, num_keys, 6, generator=generator)
    ring = torch.nn.functional.normalize(ring, dim=-1)
    points = nearest.prepare(torch.cat([torch.zeros(40, 1, 6), ring], dim=1))
    centre = torch.zeros(40, 1, dtype=torch.int64)
    keys = torch.arange(1, num_keys + 1).expand(40, -1)
    expected = plain(points.exact, 5, centre, keys, torch.full((40, 1), num_keys))
    for got, want in zip(nearest.nearest(points, 5, centre, keys), expected):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ('folders', 'installed'), [(None, False), (['old'], False), (['old', 'new'], True)]
)
def test_triton_3_is_told_from_none_and_from_older_ones(
    monkeypatch, tmp_path, folders, installed
):
    (tmp_path / 'new' / 'backends').mkdir(parents=True)

    class Spec:
        submodule_search_locations = [tmp_path / name for name in folders or ()]

    monkeypatch.setattr(
        nearest.importlib.util, 'find_spec', lambda name: Spec if folders else None
    )
    assert nearest._triton_is_installed.__wrapped__() is installed


def test_nothing_is_exported_where_torch_cannot_say(monkeypatch):
    # torch.compiler.is_exporting came with torch 2.7.
    monkeypatch.delattr(torch.compiler, 'is_exporting', raising=False)
    assert not nearest.exporting()
