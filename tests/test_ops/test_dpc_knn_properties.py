"""The clustering against its definition, on inputs that Hypothesis invents."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_dpc_knn

from clustr_mm.ops import dpc_knn, window_dpc_knn

# The package exports functions under the names of these modules.
dpc_module = importlib.import_module('clustr_mm.ops.dpc_knn')
nearest = importlib.import_module('clustr_mm.ops.nearest')


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
    tokens = tokens * 2.0 ** draw(st.integers(-120, 110))
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


def check(tokens, data):
    length = tokens.shape[1]
    counts = data.draw(st.lists(st.integers(1, length), min_size=1, max_size=3))
    k = data.draw(st.integers(1, 8))
    labels = dpc_knn(tokens, counts, k)
    for count, label, expected in zip(counts, labels, naive_dpc_knn(tokens, counts, k)):
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
def test_definition_in_any_budget(tokens, data, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nearest.BLOCK_ELEMENTS, 'cpu', budget)
        check(tokens, data)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(tokens=st.one_of(random_tokens(), tiny_integers()), data=st.data())
def test_definition_without_a_look_at_numbers(tokens, data):
    """The way of a GPU without Triton, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        for user in (nearest, dpc_module):
            patch.setattr(user, 'is_readable', lambda _: False)
        check(tokens, data)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(tokens=random_tokens(longest=40), data=st.data())
def test_definition_by_the_kernel(tokens, data):
    module = pytest.importorskip('clustr_mm.ops.triton_nearest')
    if not nearest._triton_is_installed():
        pytest.skip('no Triton 3')
    if torch.cuda.is_available():
        pytest.skip('Triton compiles for the GPU here')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, '_search_by_kernel', module.search)
        for user in (nearest, dpc_module):
            patch.setattr(user, 'has_kernel', lambda _: True)
            patch.setattr(user, 'is_readable', lambda _: False)
        check(tokens, data)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    hw=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    window=st.integers(1, 22),
    reduction=st.integers(1, 5),
)
def test_windows_label_every_cluster(hw, window, reduction):
    tokens = torch.randn(
        1, hw[0] * hw[1], 4, generator=torch.Generator().manual_seed(0)
    )
    labels, totals = window_dpc_knn(
        tokens, hw, window, lambda n: (max(1, n // reduction),)
    )
    assert torch.equal(labels[0].unique(), torch.arange(totals[0]))
