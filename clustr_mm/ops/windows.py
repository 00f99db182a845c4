"""Clustering of a token map window by window."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .dpc_knn import dpc_knn


def window_dpc_knn(
    tokens: Tensor,
    hw: tuple[int, int],
    window: int | None,
    cluster_counts: Callable[[int], Sequence[int]],
    k: int = 5,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Cluster the tokens of a map inside near-equal windows.

    The map is cut into the fewest rectangles of at most ``window`` tokens a
    side whose sides differ by one at most; each is clustered by itself, with
    as many clusters as its own tokens call for. The cost is linear in the
    size of the map. Not in the ClusTR paper; kin: TCFormerV2's clustering in
    grid parts (arXiv 2407.11321).

    Args:
        tokens (Tensor): (B, h * w, C), floating point.
        hw (tuple[int, int]): h and w of the token map.
        window (int, optional): Largest side of a window in tokens, at least
            1; None for one window of any size.
        cluster_counts (Callable[[int], Sequence[int]]): Gives the cluster
            counts of each scale for a number of tokens.
        k (int): See :func:`dpc_knn`. Defaults to 5.

    Returns:
        tuple[tuple[Tensor], tuple[int]]: For each scale, labels (B, h * w)
        int64 and the number of clusters. Labels count on from window to
        window; inside a window of more tokens than clusters they are
        :func:`dpc_knn`'s.

    Raises:
        ValueError: If ``window`` is below 1, or as :func:`dpc_knn`.
    """
    if window is not None and window < 1:
        raise ValueError(f'window must be None or at least 1, got {window}')
    height, width = hw
    if window is None or (height <= window and width <= window):
        counts = tuple(cluster_counts(tokens.shape[1]))
        return _cluster(tokens, counts, k), counts

    batch, _, channels = tokens.shape
    token_map = tokens.view(batch, height, width, channels)
    label_maps, totals = None, None
    # Windows come in up to four sizes; those of one size form a batch.
    for y0, rows, h in _split(height, window):
        for x0, columns, w in _split(width, window):
            part = token_map[:, y0 : y0 + rows * h, x0 : x0 + columns * w]
            part = part.reshape(batch, rows, h, columns, w, channels)
            part = part.transpose(2, 3).reshape(-1, h * w, channels)
            counts = tuple(cluster_counts(h * w))
            if totals is None:
                totals = [0] * len(counts)
                label_maps = [
                    torch.empty(hw, dtype=torch.int64, device=tokens.device).repeat(
                        batch, 1, 1
                    )
                    for _ in counts
                ]
            number = torch.arange(rows * columns, device=tokens.device)[:, None]
            for scale, labels in enumerate(_cluster(part, counts, k)):
                labels = labels.view(batch, rows * columns, h * w)
                labels = labels + (number * counts[scale] + totals[scale])
                labels = labels.view(batch, rows, columns, h, w).transpose(2, 3)
                label_maps[scale][:, y0 : y0 + rows * h, x0 : x0 + columns * w] = (
                    labels.reshape(batch, rows * h, columns * w)
                )
                totals[scale] += rows * columns * counts[scale]
    return tuple(labels.flatten(1) for labels in label_maps), tuple(totals)


def _cluster(tokens: Tensor, counts: Sequence[int], k: int) -> tuple[Tensor, ...]:
    """:func:`dpc_knn`, but as many clusters as tokens come in token order."""
    length = tokens.shape[1]
    fewer = [count for count in counts if count < length]
    labels = iter(dpc_knn(tokens, fewer, k) if fewer else ())
    own = torch.arange(length, device=tokens.device).expand(tokens.shape[:2])
    return tuple(next(labels) if count < length else own for count in counts)


def _split(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Cut an axis into near-equal parts.

    Yields:
        tuple[int, int, int]: Start, number and length of parts of one length.
    """
    parts = -(-length // window)
    short, longer = divmod(length, parts)
    if longer:
        yield 0, longer, short + 1
    yield longer * (short + 1), parts - longer, short
