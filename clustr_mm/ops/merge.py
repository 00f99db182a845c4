"""Merging of clustered tokens into one token per cluster."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .dpc_knn import check_number, check_tokens

#: Added to the weight sum of a cluster, as in the paper's public figures.
EPS = 1e-6


class Clusters(NamedTuple):
    """What a clusterer returns; one of a user's own may return a pair.

    Attributes:
        labels (tuple[Tensor]): (B, N) int64, for each scale.
        counts (tuple[int]): Number of clusters M, for each scale.
        means (tuple[Tensor | None], optional): (B, M, C) for each scale, what stands
            for a cluster without tokens; zeros do where it is None.
    """

    labels: tuple[Tensor, ...]
    counts: tuple[int, ...]
    means: tuple[Tensor | None, ...] | None = None


def merge_tokens(
    tokens: Tensor, clusters: Clusters, weights: Tensor
) -> tuple[Tensor, ...]:
    """Merge the tokens of every cluster into their weighted mean, at every scale.

    Cluster ``m`` becomes ``sum(w_i * x_i) / (sum(w_i) + 1e-6)`` over its tokens ``i``
    (ClusTR, arXiv 2208.13138, token aggregation); with ``clusters.means``, its mean is
    one more token, of weight 1e-6. A scale with as many clusters as tokens keeps every
    token by itself, in the order of the tokens. Sums run in float32 (float64 for
    float64 tokens) whatever the input or autocast, and in a fixed order, so that equal
    inputs give equal bits on a GPU as well. Gradients flow to tokens and weights.

    Args:
        tokens (Tensor): (B, N, C), floating point.
        clusters (Clusters): Labels, counts M and means; that labels are below M is
            not checked.
        weights (Tensor): (B, N) or (B, N, 1), floating point, not negative.

    Returns:
        tuple[Tensor]: (B, M, C) of the dtype of ``tokens``, for each scale.

    Raises:
        ValueError: If shapes, dtypes or counts do not fit.
    """
    check_tokens(tokens)
    batch, length, _ = tokens.shape
    shape = (batch, length)
    if weights.shape not in (shape, (*shape, 1)):
        both, got = f'{shape} or {(*shape, 1)}', tuple(weights.shape)
        raise ValueError(f'weights must have shape {both}, got {got}')
    labels, counts, means = Clusters(*clusters)
    for label, count in zip(labels, counts):
        check_number('num_clusters', count)
        if label.shape != shape or label.dtype != torch.int64:
            kind = f'{tuple(label.shape)} of {label.dtype}'
            raise ValueError(f'labels must be int64 of shape {shape}, got {kind}')

    # Autocast does not know the meta device.
    kind = 'cpu' if tokens.is_meta else tokens.device.type
    with torch.autocast(kind, enabled=False):
        wide = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        weights = weights.reshape(batch, length, 1).to(wide)
        # The weight rides along as one more channel: one pass for both sums.
        summands = torch.cat([tokens * weights, weights], dim=2)
        merged = []
        for label, count, mean in zip(labels, counts, means or [None] * len(counts)):
            if count == length:
                sums, weight = summands[..., :-1], weights + EPS
            elif mean is None:
                start = summands.new_zeros(batch, count, summands.shape[2])
                sums = sum_clusters(summands, label, start)
                sums, weight = sums[..., :-1], sums[..., -1:] + EPS
            else:
                start = F.pad(mean.to(wide), (0, 1), value=1.0) * EPS
                sums = sum_clusters(summands, label, start)
                sums, weight = sums[..., :-1], sums[..., -1:]
            merged.append((sums / weight).to(tokens.dtype))
    return tuple(merged)


def sum_clusters(values: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    """Add values (B, N, D) by their labels (B, N) to (B, M, D), in a fixed order."""
    images = torch.arange(len(labels), device=labels.device).unsqueeze(1)
    if values.is_cuda:
        # index_add would add atomically, in an order that varies.
        return start.index_put((images, labels), values, accumulate=True)
    rows = (labels + images * start.shape[1]).flatten()
    return start.flatten(0, 1).index_add(0, rows, values.flatten(0, 1)).view_as(start)
