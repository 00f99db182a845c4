"""The clustering against its definition, on inputs that Hypothesis invents."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_dpc_knn

from clustr_mm.ops import DPCKNN, dpc_knn, grid_cells, kmeans, search

# The package exports a function under the name of this module.
dpc_module = importlib.import_module('clustr_mm.ops.dpc_knn')


@st.composite
def random_tokens(draw, longest=90):
    """Tokens of every kind that a network, or a test, may come up with."""
    batch = draw(st.integers(1, 3))
    length = draw(st.integers(1, longest))
    channels = draw(st.sampled_from([1, 2, 3, 16, 17, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tokens = torch.randn(batch, length, channels, generator=generator)
    if draw(st.booleans()):
        # Copies, near and far from each other.
        distinct = draw(st.integers(1, length))
        tokens = tokens[:, torch.randint(distinct, (length,), generator=generator)]
    if draw(st.booleans()):
        # Whole numbers: many equal distances between different tokens.
        tokens = (tokens * draw(st.integers(1, 3))).round()
    # Not so far from 1 that in the score one of its two terms is lost in rounding.
    tokens = tokens * 2.0 ** draw(st.integers(-10, 10))
    if draw(st.booleans()):
        tokens = tokens + tokens.abs().max() * draw(st.integers(-100, 100))
    return tokens


@st.composite
def tiny_integers(draw):
    """A handful of tokens, every component chosen by itself."""
    length, channels = draw(st.integers(1, 9)), draw(st.integers(1, 2))
    values = st.lists(
        st.integers(-2, 2), min_size=length * channels, max_size=length * channels
    )
    return torch.tensor(draw(values)).view(1, length, channels).float()


def check(tokens, data, **patches):
    length = tokens.shape[1]
    counts = data.draw(st.lists(st.integers(1, length), min_size=1, max_size=3))
    k = data.draw(st.integers(1, 8))
    integers, square = search.to_integers(tokens)
    exact = integers / square.sqrt().unsqueeze(2)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patches.items():
            for user in (search, dpc_module):
                patch.setattr(user, name, value, raising=False)
        labels = dpc_knn(tokens, counts, k)
    for count, label, expected in zip(counts, labels, naive_dpc_knn(exact, counts, k)):
        assert torch.equal(label, expected)
        # Every cluster has its centre, at least.
        assert all(len(row.unique()) == count for row in label)


@settings(deadline=None, max_examples=120, derandomize=True)
@given(tokens=random_tokens(), data=st.data())
def test_definition(tokens, data):
    check(tokens, data)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(tokens=tiny_integers(), data=st.data())
def test_definition_on_ties(tokens, data):
    check(tokens, data)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(tokens=random_tokens(), data=st.data(), budget=st.integers(1, 5000))
def test_definition_in_blocks(tokens, data, budget):
    check(tokens, data, DENSE_TOKENS=0, BLOCK_ELEMENTS=dict(cpu=budget, cuda=budget))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(tokens=st.one_of(random_tokens(), tiny_integers()), data=st.data())
def test_definition_without_a_look_at_numbers(tokens, data):
    """The way of a GPU without Triton, on the CPU."""
    check(tokens, data, DENSE_TOKENS=0, may_read=lambda _: False)


def matmul(a, b, dtype):
    """Equal columns give equal products, as on a GPU.

    Those of the interpreter's BLAS differ by where in the matrix they stand, on some
    CPUs, and copies of a token would not be equally far from others.
    """
    return np.add.reduce(a[:, :, None] * b[None], axis=1, dtype=dtype)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(tokens=random_tokens(longest=40), data=st.data())
def test_definition_by_the_kernel(tokens, data):
    pytest.importorskip('triton.backends')
    if torch.cuda.is_available():
        pytest.skip('Triton compiles for the GPU here')
    kernel = importlib.import_module('clustr_mm.ops.triton_search').search
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, 'matmul', matmul)
        check(
            *(tokens, data),
            DENSE_TOKENS=0,
            may_read=lambda _: False,
            find_kernel=lambda _: kernel,
        )


hw_and_count = st.tuples(st.integers(1, 20), st.integers(1, 20)).flatmap(
    lambda hw: st.tuples(st.just(hw), st.integers(1, hw[0] * hw[1]))
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(case=hw_and_count, window=st.integers(1, 22))
def test_windows_label_every_cluster(case, window):
    hw, count = case
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, hw[0] * hw[1], 4, generator=generator)
    found = DPCKNN(window=window)(tokens, hw, (count,))
    assert torch.equal(found.labels[0].unique(), torch.arange(found.counts[0]))


@settings(deadline=None, max_examples=80, derandomize=True)
@given(case=hw_and_count, steps=st.integers(1, 3))
def test_grid_and_kmeans_of_any_map(case, steps):
    hw, count = case
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, hw[0] * hw[1], 4, generator=generator)
    asked = (count, min(4 * count, hw[0] * hw[1]))
    labels, counts = grid_cells(tokens, hw, asked)
    for label, got, wanted in zip(labels, counts, asked):
        assert torch.equal(label[1].unique(), torch.arange(got))
        assert 1 <= got <= wanted
    # Fine cells lie in coarse ones.
    pairs = torch.stack([labels[0][0], labels[1][0]], dim=1).unique(dim=0)
    assert len(pairs) == counts[1]

    labels, again, means = kmeans(tokens, hw, asked, steps)
    assert again == counts
    for label, got, mean in zip(labels, counts, means):
        assert label.min() >= 0 and label.max() < got
        if got < tokens.shape[1]:
            assert mean.shape == (2, got, 4) and mean.isfinite().all()
