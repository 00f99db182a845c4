import importlib
import subprocess
import sys

import pytest
import torch
from naive import naive_dpc_knn, randn

from clustr_mm.ops import dpc_knn, search

# The package exports a function under the name of this module.
dpc_module = importlib.import_module('clustr_mm.ops.dpc_knn')

WAYS = ['dense', 'in blocks', 'in blocks without a look']


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """All ways of the plain operations, whatever the number of tokens."""
    choose(request.param, monkeypatch)
    return request.param


def choose(way, monkeypatch):
    monkeypatch.setattr(search, 'DENSE_TOKENS', 2**20 if way == 'dense' else 0)
    for user in (search, dpc_module):
        if way == 'in blocks without a look':
            monkeypatch.setattr(user, 'may_read', lambda _: False)
        if way == 'exported':
            monkeypatch.setattr(user, 'exporting', lambda: True)


def rounded(tokens):
    """The numbers that distances are computed of."""
    integers, square = search.to_integers(tokens)
    return integers / square.sqrt().unsqueeze(2)


def check(tokens, counts, k=5):
    labels = dpc_knn(tokens, counts, k)
    expected = naive_dpc_knn(tokens, counts, k)
    assert isinstance(labels, tuple) and len(labels) == len(counts)
    for label, want in zip(labels, expected):
        assert label.dtype == torch.int64
        assert torch.equal(label, want)
    return labels


@pytest.mark.parametrize('batch', [1, 2, 3])
@pytest.mark.parametrize(
    ('length', 'channels'), [(36, 16), (49, 33), (64, 64), (200, 3), (300, 20)]
)
def test_random_tokens(batch, length, channels, way):
    check(randn(batch, length, channels), [length // 16 + 1, length // 4, length])


@pytest.mark.parametrize('copies', [2, 5, 40, 200])
def test_duplicates(copies, way):
    distinct = randn(2, 200 // copies, 24)
    tokens = distinct.repeat(1, copies, 1)
    check(tokens, [10, 50, 120])
    check(distinct.repeat_interleave(copies, dim=1), [10, 50, 120])


@pytest.mark.parametrize('seed', range(5))
def test_ties_of_integers(seed, way):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-1, 2, (2, 180, 4), generator=generator).float()
    check(tokens, [11, 45, 100])


# At 1e-44 few bits of a float32 are left, and its inverse is none.
@pytest.mark.parametrize('scale', [1e-44, 1e-38, 1e-20, 1e-6, 1e3, 1e12, 1e37])
def test_scale(scale, way):
    # exp(-d^2) is 1 or 0 here: densities must not be compared by value.
    check(randn(2, 80, 8) * scale, [5, 20])


@pytest.mark.parametrize('offset', [0, 1e4, 3e5, -3e5])
def test_far_from_the_origin(offset, way):
    check(randn(2, 200, 8) + offset, [5, 20, 200])


def test_rounding_is_that_of_float32():
    tokens = randn(3, 200, 64)
    moved = rounded(tokens) - tokens.double()
    # All tokens are shifted alike, too, which changes no distance.
    error = (moved - moved[:, :1]).abs().max()
    assert 0 < error <= 2 * 2.0**-24 * tokens.norm(dim=2).max()
    integers = tokens.mul(3).round()
    moved = rounded(integers) - integers.double()
    assert torch.equal(moved, moved[:, :1].expand_as(moved))


def test_tokens_are_rounded_to_whole_numbers_of_equal_length():
    for scale in (1e-44, 1e-6, 1.0, 1e30):
        integers, _ = search.to_integers(randn(2, 50, 20) * scale)
        assert torch.equal(integers, integers.round())
        longest = integers.norm(dim=2).amax(dim=1)
        assert (longest >= 2**23 - 10).all() and (longest <= 2**24 + 10).all()


@pytest.mark.parametrize('shift', [0.0, 40.0])
def test_tokens_that_float32_cannot_tell_apart(shift, monkeypatch):
    """Distances that differ by less than float32 rounds are told apart."""
    choose('dense', monkeypatch)
    ring = torch.nn.functional.normalize(randn(2, 300, 6), dim=-1)
    tokens = torch.cat([torch.zeros(2, 40, 6), ring], dim=1) + shift
    labels = dpc_knn(tokens, [5, 20])
    for label, want in zip(labels, naive_dpc_knn(rounded(tokens), [5, 20])):
        assert torch.equal(label, want)


@pytest.mark.parametrize('spread', [1e-2, 1e-3])
def test_two_groups_far_apart(spread, way):
    """Their distance leaves few digits for those inside a group."""
    far = 5.7 * torch.nn.functional.normalize(randn(1, 1, 32), dim=-1)
    near = spread * randn(2, 120, 32, seed=2)
    tokens = torch.cat([near[:, :60] + far, near[:, 60:] - far], dim=1)
    labels = dpc_knn(tokens, [8, 30])
    expected = naive_dpc_knn(rounded(tokens), [8, 30])
    for label, want in zip(labels, expected):
        if way == 'dense':
            assert torch.equal(label, want)
        else:
            # Some neighbours are missed; tokens stay in their group.
            assert (label == want).float().mean() > 0.5
            first, second = (set(part.tolist()) for part in label[0].split(60))
            assert not first & second


@pytest.mark.parametrize('limits', ['BLOCK_ELEMENTS', 'DENSE_ELEMENTS'])
def test_search_in_many_blocks(monkeypatch, limits):
    tokens = randn(3, 200, 8)
    choose('dense' if limits == 'DENSE_ELEMENTS' else 'in blocks', monkeypatch)
    whole = check(tokens, [12, 50])
    monkeypatch.setitem(getattr(search, limits), 'cpu', 1000)
    for a, b in zip(whole, check(tokens, [12, 50])):
        assert torch.equal(a, b)


@pytest.mark.parametrize('way', ['dense', 'in blocks'])
def test_distances_held_stay_in_the_limit(monkeypatch, way):
    sizes = []

    def spy(real, *args, **kwargs):
        out = real(*args, **kwargs)
        sizes.append(out.numel())
        return out

    for name in ('bmm', 'baddbmm'):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=real, **k: spy(f, *a, **k))
    choose(way, monkeypatch)
    monkeypatch.setitem(search.BLOCK_ELEMENTS, 'cpu', 2**14)
    monkeypatch.setitem(search.DENSE_ELEMENTS, 'cpu', 2**17)
    dpc_knn(randn(4, 256, 8), [16, 64])
    assert sizes and max(sizes) <= (2**17 if way == 'dense' else 2**14)


PEAK_MEMORY = """
import resource, torch
from clustr_mm.ops import dpc_knn
torch.manual_seed(0)
dpc_knn(torch.randn(1, 256, 64), (4, 16))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dpc_knn(torch.randn(1, 16384, 64), (256, 1024))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='ru_maxrss is in KiB on Linux')
def test_process_never_holds_a_matrix_of_all_distances():
    done = subprocess.run(
        [sys.executable, '-c', PEAK_MEMORY], capture_output=True, text=True, check=True
    )
    # The whole matrix has 16384**2 float32: 1 GiB.
    assert int(done.stdout) < 256 * 1024


def test_float32_inside_autocast_when_exported(monkeypatch):
    # Two groups so far apart that a search in bfloat16 would miss neighbours.
    tokens = randn(1, 400, 16) * 0.05
    tokens[:, ::2] += 1
    plain = dpc_knn(tokens, [25, 100])
    choose('exported', monkeypatch)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixed = dpc_knn(tokens, [25, 100])
    for a, b in zip(plain, mixed):
        assert torch.equal(a, b)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_clustered_in_float32(dtype):
    tokens = randn(2, 64, 16).to(dtype)
    assert torch.equal(dpc_knn(tokens, [9])[0], dpc_knn(tokens.float(), [9])[0])


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
def test_not_finite_counts_as_zero(value):
    tokens = randn(1, 60, 8)
    broken = tokens.clone()
    # In so many tokens that another number than zero would show.
    broken[0, ::3, 2], broken[0, 9] = value, value
    tokens[0, ::3, 2], tokens[0, 9] = 0, 0
    for a, b in zip(dpc_knn(broken, [15, 40]), dpc_knn(tokens, [15, 40])):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ('shape', 'counts', 'k', 'message'),
    [
        ((2, 9), [1], 5, r'\(B, N, C\).*\(2, 9\)'),
        ((0, 9, 4), [1], 5, r'no empty axis.*\(0, 9, 4\)'),
        ((2, 0, 4), [1], 5, r'no empty axis.*\(2, 0, 4\)'),
        ((2, 9, 0), [1], 5, r'no empty axis.*\(2, 9, 0\)'),
        ((2, 9, 4), [], 5, r'from 1 to N = 9.*\[\]'),
        ((2, 9, 4), [0], 5, r'from 1 to N = 9.*\[0\]'),
        ((2, 9, 4), [3, 10], 5, r'from 1 to N = 9.*\[3, 10\]'),
        ((2, 9, 4), [2.5], 5, r'from 1 to N = 9.*\[2\.5\]'),
        ((2, 9, 4), 3, 5, r'sequence of counts, got 3'),
        ((2, 9, 4), [3], 0, 'k must be an integer from 1 up, got 0'),
        ((2, 9, 4), [3], 2.5, r'k must be an integer from 1 up, got 2\.5'),
        ((2, 9, 4), [3], '5', "k must be an integer from 1 up, got '5'"),
    ],
)
def test_wrong_arguments(shape, counts, k, message):
    with pytest.raises(ValueError, match=message):
        dpc_knn(torch.zeros(shape), counts, k)


def test_wrong_dtype():
    with pytest.raises(ValueError, match=r'floating-point tensor, got torch\.int64'):
        dpc_knn(torch.zeros(1, 9, 4, dtype=torch.int64), [3])
    with pytest.raises(ValueError, match='floating-point tensor, got list'):
        dpc_knn([[[1.0]]], [1])


@pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'), reason='torch before 2.7'
)
def test_exported_graph_needs_no_operator_of_this_package():
    class Clustering(torch.nn.Module):
        def forward(self, tokens):
            return dpc_knn(tokens, [3, 12])

    tokens = randn(2, 30, 16)
    program = torch.export.export(Clustering(), (tokens,))
    assert not any('clustr_mm' in str(node.target) for node in program.graph.nodes)
    for seed in range(3):
        tokens = randn(2, 30, 16, seed=seed)
        for got, want in zip(program.module()(tokens), dpc_knn(tokens, [3, 12])):
            assert torch.equal(got, want)


@pytest.mark.parametrize('way', ['dense', 'in blocks'])
def test_device_without_float64(way, monkeypatch):
    """As Apple's: float32 settles the distances."""
    tokens = randn(2, 200, 8)
    expected = dpc_knn(tokens, [12, 50])
    choose(way, monkeypatch)
    monkeypatch.setattr(search, 'exact_dtype', lambda _: torch.float32)
    seen = set()
    real = torch.Tensor.to

    def spy(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.Tensor, 'to', spy)
    labels = dpc_knn(tokens, [12, 50])
    assert torch.float64 not in seen
    assert search.to_integers(tokens)[0].dtype == torch.float32
    for a, b in zip(labels, expected):
        # All but near ties.
        assert (a == b).float().mean() > 0.9


@pytest.mark.parametrize('legacy', [True, False])
def test_float32_is_not_rounded_to_tf32(legacy):
    """Whatever the user chose, which stays as it was."""
    matmul = torch.backends.cuda.matmul
    if not legacy and not hasattr(matmul, 'fp32_precision'):
        pytest.skip('torch before 2.9')
    name, chosen = ('allow_tf32', True) if legacy else ('fp32_precision', 'tf32')
    before = getattr(matmul, name)
    setattr(matmul, name, chosen)
    try:
        with search.full_float32():
            if hasattr(matmul, 'fp32_precision'):
                assert matmul.fp32_precision == 'ieee'
            else:
                assert not matmul.allow_tf32
        assert getattr(matmul, name) == chosen
    finally:
        setattr(matmul, name, before)
