"""Slow, plain references by the definitions, and noise to try them on."""

import math

import mpmath
import torch

mpmath.mp.dps = 100


def randn(*shape, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, **kwargs)


def naive_dpc_knn(tokens, num_clusters, k=5):
    """DPC-kNN of one image or a batch, in float64, loops and full matrices.

    Ties go to the lower token index throughout.
    """
    results = [[] for _ in num_clusters]
    for x in tokens.double():
        n, c = x.shape
        square = ((x[:, None] - x[None]) ** 2).sum(-1)
        near = square.sort(dim=1, stable=True)[0][:, : min(k, n)]
        exponent = near.mean(dim=1) / c  # rho = exp(-exponent)
        order = sorted(range(n), key=lambda i: (exponent[i].item(), i))
        score = [0.0] * n
        for place, i in enumerate(order):
            if place == 0:
                delta = math.inf  # stands for the largest distance: it is first
            else:
                delta = square[i, order[:place]].min().item()
            # log(rho * delta), because exp() would underflow, in many digits,
            # because the one term may be minute beside the other.
            log_delta = mpmath.log(delta) / 2 if delta > 0 else -mpmath.inf
            score[i] = log_delta - exponent[i].item()
        ranking = sorted(range(n), key=lambda i: (-score[i], i))
        for result, count in zip(results, num_clusters):
            centres = ranking[:count]
            by_index = sorted(centres)
            label = {}
            for i in range(n):
                join = min(by_index, key=lambda j: (square[i, j].item(), j))
                label[i] = centres.index(i if i in centres else join)
            result.append([label[i] for i in range(n)])
    return tuple(torch.tensor(result) for result in results)


def naive_merge(tokens, labels, num_clusters, weights):
    """Weighted mean of every cluster, by loops."""
    merged = tokens.new_zeros(tokens.shape[0], num_clusters, tokens.shape[2])
    for b in range(tokens.shape[0]):
        for m in range(num_clusters):
            mine = labels[b] == m
            w = weights[b][mine, None]
            merged[b, m] = (w * tokens[b][mine]).sum(0) / (w.sum() + 1e-6)
    return merged
