"""Merging tokens of clusters, against the definition."""

import random

import pytest
import torch
from naive import naive_merge

from clustr_mm.ops import Clusters, merge_tokens


def inputs(seed=0):
    random.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 30, 6, generator=generator).double()
    labels = torch.tensor([[random.randrange(7) for _ in range(30)] for _ in range(2)])
    return tokens, labels, torch.randn(2, 30, generator=generator).double().exp()


def merge(tokens, labels, count, weights, mean=None):
    """At one scale."""
    clusters = Clusters((labels,), (count,), (mean,))
    (merged,) = merge_tokens(tokens, clusters, weights)
    return merged


def test_by_definition():
    tokens, labels, weights = inputs()
    merged = merge(tokens, labels, 8, weights)
    torch.testing.assert_close(merged, naive_merge(tokens, labels, 8, weights))
    assert not merged[:, 7].any()  # nobody's cluster
    assert torch.equal(merge(tokens, labels, 8, weights[..., None]), merged)


def test_means_stand_for_empty_clusters():
    tokens, labels, weights = inputs()
    means = torch.arange(96.0).view(2, 8, 6).double()
    merged = merge(tokens, labels, 8, weights, means)
    torch.testing.assert_close(merged[:, 7], means[:, 7])
    without = merge(tokens, labels, 8, weights)
    torch.testing.assert_close(merged[:, :7], without[:, :7], rtol=0, atol=1e-3)


def test_scales():
    """Each as if it were alone; as many clusters as tokens keep their order."""
    tokens, labels, weights = inputs()
    scales = (labels, labels // 2, torch.arange(30).expand(2, -1))
    counts = (7, 4, 30)
    merged = merge_tokens(tokens, Clusters(scales, counts), weights)
    for label, count, part in zip(scales, counts, merged):
        torch.testing.assert_close(part, naive_merge(tokens, label, count, weights))
    assert torch.equal(merge_tokens(tokens, (scales, counts), weights)[0], merged[0])


def test_gradients():
    tokens, labels, weights = inputs()
    assert torch.autograd.gradcheck(
        lambda t, w: merge(t, labels, 7, w),
        (tokens.requires_grad_(), weights.requires_grad_()),
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_sums_in_float32(dtype):
    # 4096 ones: a half-precision sum would stop growing at 2048 or before.
    tokens = torch.ones(1, 4096, 1, dtype=dtype)
    tokens[:, 2048:] = 3
    labels = torch.zeros(1, 4096, dtype=torch.int64)
    weights = torch.ones(1, 4096, dtype=dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        merged = merge(tokens, labels, 1, weights)
    assert merged.dtype == dtype
    assert merged.item() == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu():
    tokens, labels, weights = inputs()
    expected = merge(tokens, labels, 8, weights)
    merged = merge(tokens.cuda(), labels.cuda(), 8, weights.cuda())
    torch.testing.assert_close(merged.cpu(), expected)
    # Many tokens to each cluster: sums in any order would not agree twice.
    tokens = torch.randn(2, 20000, 64).cuda()
    labels = torch.arange(20000, device='cuda').expand(2, -1) % 7
    first, second = (merge(tokens, labels, 7, tokens[..., 0].exp()) for _ in range(2))
    assert torch.equal(first, second)


def test_on_the_meta_device():
    tokens, labels, weights = (x.to('meta') for x in inputs())
    merged = merge(tokens.half(), labels, 8, weights)
    assert merged.is_meta and merged.shape == (2, 8, 6)
    assert merged.dtype == torch.float16


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(tokens=torch.zeros(30, 6)), r'\(B, N, C\).*\(30, 6\)'),
        (dict(tokens=torch.zeros(2, 30, 6).long()), 'int64'),
        (dict(labels=torch.zeros(2, 29).long()), r'labels.*\(2, 30\).*\(2, 29\)'),
        (dict(labels=torch.zeros(2, 30)), 'labels must be int64.*float32'),
        (dict(weights=torch.ones(30)), r'weights.*\(2, 30, 1\).*\(30,\)'),
        (dict(count=0), 'num_clusters.*got 0'),
    ],
)
def test_wrong_arguments(change, message):
    tokens, labels, weights = inputs()
    kwargs = dict(tokens=tokens, labels=labels, count=7, weights=weights)
    with pytest.raises(ValueError, match=message):
        merge(**{**kwargs, **change})
