"""Where one token looks: attention to clusters, spread over their tokens."""

from __future__ import annotations

from torch import Tensor

from ..models.clustr import MAX_IMPORTANCE, ClusteredAttention
from ..models.layers import split_heads
from ..ops import merge_tokens


def token_at(
    point: tuple[float, float], size: tuple[int, int], hw: tuple[int, int]
) -> int:
    """Find the token that :func:`resize_labels` draws at the pixel of a point.

    Args:
        point (tuple[float, float]): x and y, in pixels from the upper left corner
            of the image; the pixel in that corner goes from 0 to 1.
        size (tuple[int, int]): Height and width of the image in pixels.
        hw (tuple[int, int]): h and w of the token map.

    Returns:
        int: Index of the token, row by row.

    Raises:
        ValueError: If the point is not in the image.
    """
    (x, y), (height, width), (h, w) = point, size, hw
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f'the point {x:g}, {y:g} is outside the image of {width} x {height} pixels'
        )
    return int(y) * h // height * w + int(x) * w // width


def cluster_shares(
    attention: ClusteredAttention, tokens: Tensor, labels: Tensor, num_clusters: int
) -> Tensor:
    """Share of each token in its merged cluster: ``w_i / sum(w)`` over the cluster.

    The weight ``w_i`` is the exponential of the learned importance. The model
    divides by ``sum(w) + 1e-6`` instead, so that its shares sum to a little less.

    Args:
        attention (ClusteredAttention): Has the importance.
        tokens (Tensor): (B, N, C), what the module gets.
        labels (Tensor): (B, N) int64, from 0 to ``num_clusters`` - 1.
        num_clusters (int): M.

    Returns:
        Tensor: (B, N) float32, from 0 to 1; over each cluster the sum is 1.
    """
    importance = attention.importance(tokens).float().clamp(max=MAX_IMPORTANCE)
    importance = importance.squeeze(-1)
    # A softmax over each cluster: without the greatest importance taken off first,
    # all weights of a cluster might be too small to be told from 0.
    shape = (tokens.shape[0], num_clusters)
    greatest = importance.new_full(shape, float('-inf'))
    greatest = greatest.scatter_reduce(1, labels, importance, 'amax')
    weights = (importance - greatest.gather(1, labels)).exp()
    sums = weights.new_zeros(shape).scatter_add(1, labels, weights)
    return weights / sums.gather(1, labels)


def attention_maps(
    attention: ClusteredAttention, tokens: Tensor, hw: tuple[int, int], query: int
) -> tuple[Tensor, Tensor]:
    """Compute how much one query gets from each token, at both scales.

    With the attention ``a_hm`` of the query to cluster m in head h, a softmax over
    the clusters of one scale, token i of cluster m has ``a_hm * w_i / sum(w)``, the
    sum over cluster m (:func:`cluster_shares`). Each map sums to 1 over the tokens,
    and the output of the module for the query is

    ``proj(concat_h(sum_s sum_i map_shi * v_shi))``, ``v_shi = kv_s(x_i)``'s values,

    because the values of a merged cluster are the same mean of those of its tokens;
    exact but for the 1e-6 in the model's mean. Dropout is left out.

    Args:
        attention (ClusteredAttention): The module.
        tokens (Tensor): (B, N, C) with N = h * w, what the module gets.
        hw (tuple[int, int]): h and w.
        query (int): Index of the query, from 0 to N - 1.

    Returns:
        tuple[Tensor, Tensor]: (B, heads, N) float32 for the coarse and the fine
        clusters. The mean over the heads is what is usually looked at.

    Raises:
        ValueError: If there is no such token.
    """
    if not 0 <= query < tokens.shape[1]:
        raise ValueError(f'query must be from 0 to {tokens.shape[1] - 1}, got {query}')
    heads = attention.num_heads
    q = split_heads(attention.q(tokens[:, query : query + 1]), heads)
    weights = attention.importance(tokens).float().clamp(max=MAX_IMPORTANCE).exp()
    maps = []
    clusters = attention.cluster(tokens, hw)
    for scale, kv in enumerate((attention.kv1, attention.kv2)):
        labels, count = clusters.labels[scale], clusters.counts[scale]
        means = clusters.means and clusters.means[scale]
        merged = merge_tokens(tokens, labels, count, weights, means)
        k, _ = (split_heads(part, heads) for part in kv(merged).chunk(2, dim=-1))
        scores = (q @ k.transpose(-1, -2)).float() * k.shape[-1] ** -0.5
        to_clusters = scores.softmax(dim=-1).squeeze(-2)
        index = labels[:, None].expand(-1, heads, -1)
        shares = cluster_shares(attention, tokens, labels, count)
        maps.append(to_clusters.gather(2, index) * shares[:, None])
    return maps[0], maps[1]
