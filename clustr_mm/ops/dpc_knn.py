"""Density-peaks clustering with k nearest neighbours (DPC-kNN)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .nearest import (
    Points,
    exporting,
    has_kernel,
    is_readable,
    nearest,
    prepare,
    stable_sort,
)


def dpc_knn(
    tokens: Tensor, num_clusters: Sequence[int], k: int = 5
) -> tuple[Tensor, ...]:
    """Cluster the tokens of every image by density peaks, at several scales.

    With the distance ``d(i, j) = |x_i - x_j| / sqrt(C)``, a token's density
    is ``rho_i = exp(-mean of the k least d(i, .)^2)``, itself included, and
    ``delta_i`` its distance to the nearest denser token. The M tokens of
    highest ``rho_i * delta_i`` are the centres; every token joins its nearest
    centre, a centre itself (ClusTR, arXiv 2208.13138; DPC-kNN: Du et al.,
    2016). All ties go to the lower token index: it counts as denser, ranks
    first and is nearer. The result is therefore a function of the input, as
    exact as float64 is on a CPU; for what float32 cannot tell apart in a crowd
    or on a GPU see :func:`.nearest.nearest`.

    No gradient flows, autocast does not apply, and no more than a block of
    the N x N distances exists at a time (``nearest.BLOCK_ELEMENTS``).

    Args:
        tokens (Tensor): (B, N, C), floating point, B, N, C at least 1. NaN
            and infinite components count as zero here.
        num_clusters (Sequence[int]): Cluster counts M, each from 1 to N.
        k (int): Neighbours that make the density, the token included; at
            least 1, N are taken where it is larger. Defaults to 5.

    Returns:
        tuple[Tensor]: For each count the labels (B, N) int64 from 0 to M - 1;
        clusters are numbered by falling score of their centres.

    Raises:
        ValueError: If an argument is not as stated.

    Examples:
        >>> import torch
        >>> from clustr_mm.ops import dpc_knn
        >>> coarse, fine = dpc_knn(torch.rand(2, 196, 64), (12, 49))
        >>> fine.shape, int(fine.max())
        (torch.Size([2, 196]), 48)
    """
    counts = _check(tokens, num_clusters, k)
    # A graph for other runtimes gets plain operations, torch.compile one node.
    run = _dpc_knn if exporting() else torch.ops.clustr_mm.dpc_knn
    return tuple(run(tokens.detach(), counts, k))


def _dpc_knn(tokens: Tensor, num_clusters: Sequence[int], k: int) -> list[Tensor]:
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        points = prepare(tokens)
        ranking = _rank_by_score(points, min(k, tokens.shape[1]))
        labels = _assign(points, ranking, num_clusters)
    # Outputs of an operator must not share memory, not even for equal counts.
    return [labels[count].clone() for count in num_clusters]


def _fake_dpc_knn(tokens: Tensor, num_clusters: Sequence[int], k: int) -> list[Tensor]:
    return [tokens.new_empty(tokens.shape[:2], dtype=torch.int64) for _ in num_clusters]


_LIBRARY = torch.library.Library('clustr_mm', 'DEF')
_LIBRARY.define('dpc_knn(Tensor tokens, SymInt[] num_clusters, int k) -> Tensor[]')
_LIBRARY.impl('dpc_knn', _dpc_knn, 'CompositeExplicitAutograd')
# What torch.compile and the meta device run; register_fake came with torch 2.4.
_LIBRARY.impl('dpc_knn', _fake_dpc_knn, 'Meta')


def _check(tokens: Tensor, num_clusters: Sequence[int], k: int) -> list[int]:
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        kind = getattr(tokens, 'dtype', type(tokens).__name__)
        raise ValueError(f'tokens must be a floating-point tensor, got {kind}')
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(
            'tokens must have shape (B, N, C) with no empty axis, got '
            f'{tuple(tokens.shape)}'
        )
    if not isinstance(k, int) or k < 1:
        raise ValueError(f'k must be an integer from 1 up, got {k}')
    if not isinstance(num_clusters, Sequence):
        raise ValueError(
            f'num_clusters must be a sequence of counts, got {num_clusters}'
        )
    counts = list(num_clusters)
    length = tokens.shape[1]
    integers = all(isinstance(count, (int, torch.SymInt)) for count in counts)
    if not counts or not integers or min(counts) < 1 or max(counts) > length:
        raise ValueError(
            f'num_clusters must be counts from 1 to N = {length}, got {counts}'
        )
    return counts


def _rank_by_score(points: Points, k: int) -> Tensor:
    """Token indices (B, N) by falling score ``rho * delta``, ties by index."""
    distances, neighbours = nearest(points, k)
    # Densities are compared by their logarithm, which neither underflows for
    # far-apart tokens nor rounds to one for close ones.
    channels = points.exact.shape[-1]
    unit = points.scale.square().unsqueeze(-1) / channels
    sparsity = distances.mean(dim=-1) * unit
    by_density = stable_sort(sparsity)[1]
    rank = _invert(by_density)

    # A denser token among the k nearest is the nearest denser one; only
    # local peaks of the density have to look further.
    denser = rank.gather(1, neighbours.flatten(1)).view_as(neighbours)
    denser = denser < rank.unsqueeze(-1)
    delta = distances.masked_fill(~denser, float('inf')).amin(dim=-1)
    delta = _search_beyond(points, delta, rank, by_density)

    # Beside the one of its terms the other may be lost in rounding, for tokens
    # very close or very far apart: where scores seem equal, both terms decide.
    # The unit of delta is common to all tokens and left out.
    score = delta.log() / 2 - sparsity
    sparsity = sparsity.masked_fill(delta == 0, float('inf'))
    order = stable_sort(delta, descending=True)[1]
    order = order.gather(1, stable_sort(sparsity.gather(1, order))[1])
    score = score.gather(1, order)
    return order.gather(1, stable_sort(score, descending=True)[1])


def _search_beyond(
    points: Points, delta: Tensor, rank: Tensor, by_density: Tensor
) -> Tensor:
    """Fill in ``delta`` where it is infinite: at local density peaks.

    Args:
        points (Points): Prepared tokens.
        delta (Tensor): (B, N) float64 squared distances.
        rank (Tensor): (B, N) int64, 0 for the densest token.
        by_density (Tensor): (B, N) int64, token indices by falling density.

    Returns:
        Tensor: (B, N) float64, infinite only for the densest token. (By the
        paper it gets the largest distance; its score is the highest anyway.)
    """
    peak = delta.isinf()
    # Peaks first, the denser before: a block of rows then needs few keys, and
    # the kernel has nothing to do after the last peak.
    order = torch.where(peak, rank, rank + rank.shape[1]).argsort(dim=1)
    if is_readable(delta) and not has_kernel(delta):
        order = order[:, : int(peak.sum(dim=1).max())]
    limits = torch.where(peak, rank, 0).gather(1, order)
    found = nearest(points, 1, order, by_density, limits)[0].squeeze(-1)
    found = torch.where(peak.gather(1, order), found, delta.gather(1, order))
    return delta.scatter(1, order, found)


def _assign(points: Points, ranking: Tensor, counts: Sequence[int]) -> dict:
    """Join every token to its nearest centre, for every count.

    The centres of a smaller count are the first of those of a larger one, so
    each count only looks at the centres that it adds.

    Returns:
        dict[int, Tensor]: Labels (B, N) int64 by count.
    """
    batch, length = ranking.shape
    best = ranking.new_full((batch, length), length)
    label = torch.zeros_like(best)
    distance = points.exact.new_full(best.shape, float('inf'))
    labels = {}
    start = 0
    for count in sorted(set(counts)):
        if count == length:
            labels[count] = _invert(ranking)
            break
        centres, order = ranking[:, start:count].sort(dim=1)
        new_distance, position = nearest(points, 1, keys=centres)
        new_distance, position = new_distance.squeeze(-1), position.squeeze(-1)
        new = centres.gather(1, position)
        closer = (new_distance < distance) | ((new_distance == distance) & (new < best))
        distance = torch.where(closer, new_distance, distance)
        best = torch.where(closer, new, best)
        label = torch.where(closer, order.gather(1, position) + start, label)
        own = torch.arange(count, device=label.device).expand(batch, -1)
        labels[count] = label.scatter(1, ranking[:, :count], own)
        start = count
    return labels


def _invert(permutation: Tensor) -> Tensor:
    """Inverse of the permutations in the rows of a (B, N) int64 tensor."""
    positions = torch.arange(permutation.shape[1], device=permutation.device)
    return torch.empty_like(permutation).scatter_(
        1, permutation, positions.expand_as(permutation)
    )
