"""Merging of clustered tokens into one token per cluster."""

import torch
from torch import Tensor

#: Added to the weight sum of a cluster, as in the paper's public figures.
EPS = 1e-6


def merge_tokens(
    tokens: Tensor, labels: Tensor, num_clusters: int, weights: Tensor
) -> Tensor:
    """Merge the tokens of every cluster into their weighted mean.

    Cluster ``m`` becomes ``sum(w_i * x_i) / (sum(w_i) + 1e-6)`` over its
    tokens ``i`` (ClusTR, arXiv 2208.13138, token aggregation). Sums run in
    float32 (float64 for float64 tokens) whatever the input or autocast, and
    in a fixed order, so that equal inputs give equal bits on a GPU as well.
    Gradients flow to ``tokens`` and ``weights``.

    Args:
        tokens (Tensor): (B, N, C), floating point.
        labels (Tensor): (B, N) int64, each in ``[0, num_clusters)``; not
            checked on a GPU, where a check would wait for the device.
        num_clusters (int): M, at least 1.
        weights (Tensor): (B, N) or (B, N, 1), floating point, not negative.

    Returns:
        Tensor: (B, M, C) of the dtype of ``tokens``; a cluster without
        tokens is zero.

    Raises:
        ValueError: If shapes, dtypes or ``num_clusters`` do not fit.
    """
    if tokens.ndim != 3 or not tokens.is_floating_point():
        raise ValueError(
            'tokens must be a floating-point tensor of shape (B, N, C), got '
            f'{tuple(tokens.shape)} of {tokens.dtype}'
        )
    batch, length, channels = tokens.shape
    if labels.shape != (batch, length) or labels.dtype != torch.int64:
        raise ValueError(
            f'labels must be int64 of shape {(batch, length)}, got '
            f'{tuple(labels.shape)} of {labels.dtype}'
        )
    if weights.shape not in ((batch, length), (batch, length, 1)):
        raise ValueError(
            f'weights must have shape {(batch, length)} or '
            f'{(batch, length, 1)}, got {tuple(weights.shape)}'
        )
    if num_clusters < 1:
        raise ValueError(f'num_clusters must be at least 1, got {num_clusters}')

    # Autocast does not know the meta device.
    kind = 'cpu' if tokens.is_meta else tokens.device.type
    with torch.autocast(kind, enabled=False):
        wide = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        weights = weights.reshape(batch, length, 1).to(wide)
        # The weight rides along as one more channel: one pass for both sums.
        summands = torch.cat([tokens.to(wide) * weights, weights], dim=-1)
        offsets = torch.arange(batch, device=labels.device) * num_clusters
        rows = (labels + offsets[:, None]).flatten()
        sums = summands.new_zeros(batch * num_clusters, channels + 1)
        summands = summands.flatten(0, 1)
        if sums.is_cuda:
            # index_add would add atomically, in an order that varies.
            sums = sums.index_put((rows,), summands, accumulate=True)
        else:
            sums = sums.index_add(0, rows, summands)
        sums = sums.view(batch, num_clusters, channels + 1)
        merged = sums[..., :-1] / (sums[..., -1:] + EPS)
    return merged.to(tokens.dtype)
