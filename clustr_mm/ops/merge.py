"""Merging of clustered tokens into one token per cluster."""

import torch
from torch import Tensor

from .dpc_knn import check_number, check_tokens

#: Added to the weight sum of a cluster, as in the paper's public figures.
EPS = 1e-6


def merge_tokens(
    tokens: Tensor,
    labels: Tensor,
    num_clusters: int,
    weights: Tensor,
    means: Tensor | None = None,
) -> Tensor:
    """Merge the tokens of every cluster into their weighted mean.

    Cluster ``m`` becomes ``sum(w_i * x_i) / (sum(w_i) + 1e-6)`` over its tokens ``i``
    (ClusTR, arXiv 2208.13138, token aggregation). Sums run in float32 (float64 for
    float64 tokens) whatever the input or autocast, and in a fixed order, so that equal
    inputs give equal bits on a GPU as well. Gradients flow to tokens and weights.

    Args:
        tokens (Tensor): (B, N, C), floating point.
        labels (Tensor): (B, N) int64 below ``num_clusters``, which is not checked.
        num_clusters (int): M, at least 1.
        weights (Tensor): (B, N) or (B, N, 1), floating point, not negative.
        means (Tensor, optional): (B, M, C), what clusters without weight become; zeros.

    Returns:
        Tensor: (B, M, C) of the dtype of ``tokens``.

    Raises:
        ValueError: If shapes, dtypes or ``num_clusters`` do not fit.
    """
    check_tokens(tokens)
    batch, length, channels = tokens.shape
    shape = (batch, length)
    if labels.shape != shape or labels.dtype != torch.int64:
        kind = f'{tuple(labels.shape)} of {labels.dtype}'
        raise ValueError(f'labels must be int64 of shape {shape}, got {kind}')
    if weights.shape not in (shape, (*shape, 1)):
        both, got = f'{shape} or {(*shape, 1)}', tuple(weights.shape)
        raise ValueError(f'weights must have shape {both}, got {got}')
    check_number('num_clusters', num_clusters)

    # Autocast does not know the meta device.
    kind = 'cpu' if tokens.is_meta else tokens.device.type
    with torch.autocast(kind, enabled=False):
        wide = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        weights = weights.reshape(batch, length, 1).to(wide)
        # The weight rides along as one more channel: one pass for both sums.
        summands = torch.cat([tokens.to(wide) * weights, weights], dim=2)
        sums = sum_clusters(summands, labels, num_clusters)
        sums, weight = sums.split([channels, 1], dim=2)
        merged = sums / (weight + EPS)
        if means is not None:
            merged = torch.where(weight == 0, means.to(wide), merged)
    return merged.to(tokens.dtype)


def sum_clusters(
    values: Tensor, labels: Tensor, num_clusters: int, start: Tensor | None = None
) -> Tensor:
    """Sum values (B, N, D) by label (B, N) to (B, M, D), in a fixed order.

    ``start`` (B, M, D) is what the sums begin with, zeros if there is none.
    """
    batch, _, channels = values.shape
    if start is None:
        start = values.new_zeros(batch, num_clusters, channels)
    images = torch.arange(batch, device=labels.device).unsqueeze(1)
    if values.is_cuda:
        # index_add would add atomically, in an order that varies.
        return start.index_put((images, labels), values, accumulate=True)
    rows = (labels + images * num_clusters).flatten()
    return start.flatten(0, 1).index_add(0, rows, values.flatten(0, 1)).view_as(start)
