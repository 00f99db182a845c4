"""k-means from the cells of a grid, and the grid itself."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .dpc_knn import check_counts, check_number, check_tokens
from .merge import sum_clusters
from .search import blocks

#: Weight of its former mean in a cluster: below the rounding of any token's own, and
#: a power of two, with which products and quotients are exact.
TRACE = 2.0**-60


def grid_shape(hw: tuple[int, int], count: int) -> tuple[int, int]:
    """Rows and columns of at most ``count`` cells, as square as they can be."""
    height, width = hw
    ideal = (count * height / width) ** 0.5
    shapes = []
    for rows in (int(ideal), int(ideal) + 1):
        rows = min(max(rows, 1), height, count)
        shapes.append((rows, min(width, count // rows)))
    return max(shapes, key=lambda shape: shape[0] * shape[1])


def grid_shapes(hw: tuple[int, int], counts: Sequence[int]) -> list[tuple[int, int]]:
    """Rows and columns of a grid for every count, each inside the one before.

    The first grid is :func:`grid_shape`'s. Each next one has twice as many rows and
    columns, four cells in place of one, or as many as the map has.
    """
    shapes = [grid_shape(hw, counts[0])]
    for _ in counts[1:]:
        shapes.append(tuple(min(2 * n, most) for n, most in zip(shapes[-1], hw)))
    return shapes


def grid_labels(
    hw: tuple[int, int], shape: tuple[int, int], device: torch.device
) -> Tensor:
    """The cell (h * w,) int64 of every token, counted row by row."""
    row, column = (
        torch.arange(side, device=device) * cells // side
        for side, cells in zip(hw, shape)
    )
    return (row.unsqueeze(1) * shape[1] + column).flatten()


def grid_cells(
    tokens: Tensor, hw: tuple[int, int], counts: Sequence[int]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Cluster tokens by place alone, whatever they hold.

    Args:
        tokens (Tensor): (B, h * w, C), floating point.
        hw (tuple[int, int]): h and w of the token map.
        counts (Sequence[int]): Most clusters at each scale, from 1 to ``h * w``, the
            fewest first; of each next one four times as many are made use of.

    Returns:
        tuple: For each scale, labels (B, h * w) and the cells of :func:`grid_shapes`.

    Raises:
        ValueError: If an argument is not as stated.
    """
    counts = check(tokens, hw, counts)
    shapes = grid_shapes(hw, counts)
    labels = [grid_labels(hw, shape, tokens.device) for shape in shapes]
    return (
        tuple(label.expand(len(tokens), -1) for label in labels),
        tuple(rows * columns for rows, columns in shapes),
    )


def kmeans(
    tokens: Tensor, hw: tuple[int, int], counts: Sequence[int], steps: int = 2
) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[Tensor, ...]]:
    """Cluster the tokens of a map by k-means from the cells of a grid.

    It starts from the means of the cells, as SLIC does (Achanta et al., 2012). In a
    step every token joins the cluster of the nearest mean, the one of lower number in
    case of a tie, and the means are computed anew; a cluster that lost all its tokens
    keeps the mean it had. That finds the finest clusters. Those of every coarser
    scale are found in the same way among the next finer ones, each weighing as much
    as it has tokens. Where there is a cell for every token nothing is to be found.

    The cost of a step is N x M x C, linear in the pixels for a given number of
    clusters, and only blocks of the N x M distances exist at a time. It is float32
    whatever the input or autocast (TF32 if PyTorch is told so); sums run in a fixed
    order, so equal inputs give equal bits on one device. No gradient flows.

    Args:
        tokens (Tensor): (B, h * w, C), floating point. NaN and infinite components
            count as zero here, others are cut off at +-1e15.
        hw (tuple[int, int]): h and w of the token map.
        counts (Sequence[int]): See :func:`grid_cells`.
        steps (int): At least 1. Defaults to 2.

    Returns:
        tuple: For each scale labels (B, h * w) int64; the number of clusters M, as of
        :func:`grid_shapes`; and their means (B, M, C) float32, None where every token
        is its own.

    Raises:
        ValueError: If an argument is not as stated.
    """
    counts = check(tokens, hw, counts)
    check_number('steps', steps)
    # Autocast does not know the meta device.
    kind = 'cpu' if tokens.is_meta else tokens.device.type
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        points = torch.nan_to_num(tokens.detach().float(), 0.0, 0.0, 0.0)
        # Squares must not overflow, and distances near the origin do not cancel.
        points = points.clamp_(-1e15, 1e15)
        origin = points.mean(dim=1, keepdim=True)
        points = points.sub_(origin)
        # With its weight as one more channel: one sum for the mean's two.
        sums = F.pad(points, (0, 1), value=1.0)

        found = []
        labels, place_hw = None, hw
        for shape in reversed(grid_shapes(hw, counts)):
            number = shape[0] * shape[1]
            if number == points.shape[1]:
                places = torch.arange(number, device=tokens.device)
                places, means = places.expand(len(tokens), -1), None
            else:
                places, sums = _kmeans(points, sums, place_hw, shape, steps)
                points = sums[..., :-1] / sums[..., -1:]
                means = points + origin
            labels = places if labels is None else places.gather(1, labels)
            found.insert(0, (labels, number, means))
            place_hw = shape
    labels, numbers, means = zip(*found)
    return labels, numbers, means


def _kmeans(
    points: Tensor,
    sums: Tensor,
    hw: tuple[int, int],
    shape: tuple[int, int],
    steps: int,
) -> tuple[Tensor, Tensor]:
    """k-means of weighted points on a map, from the cells of a grid of some shape.

    Args:
        points (Tensor): (B, h * w, C).
        sums (Tensor): (B, h * w, C + 1), the points times their weight, and the weight.

    Returns:
        tuple[Tensor, Tensor]: Labels (B, h * w), and sums of clusters (B, M, C + 1).
    """
    cells = sums.unflatten(1, hw).permute(0, 3, 1, 2)
    clusters = F.adaptive_avg_pool2d(cells, shape).permute(0, 2, 3, 1).flatten(1, 2)
    for _ in range(steps):
        means = clusters / clusters[..., -1:]
        labels = nearest_mean(points, means[..., :-1])
        # Its former mean counts among the points of a cluster, with a weight that only
        # shows where there is no other.
        clusters = sum_clusters(sums, labels, means * TRACE)
    return labels, clusters


def nearest_mean(points: Tensor, means: Tensor) -> Tensor:
    """The nearest of the means (B, M, C) to points (B, N, C), as (B, N) int64."""
    # Of the squared distance, |x|**2 - 2 x m + |m|**2, the first term is the same
    # for all means.
    norms = means.square().sum(dim=2).unsqueeze(1)
    means = means.transpose(1, 2)
    labels = []
    for image, rows in blocks(points, means.shape[2]):
        distances = torch.baddbmm(
            norms[image], points[image, rows], means[image], alpha=-2
        )
        # min() takes the first of several, and is faster than argmin().
        labels.append(distances.min(dim=2)[1])
    if len(labels) == 1:
        return labels[0]
    return torch.cat([label.flatten() for label in labels]).view(points.shape[:2])


def check(tokens: Tensor, hw: tuple[int, int], counts: Sequence[int]) -> list[int]:
    """The counts as a list; refuse what is not as :func:`grid_cells` says."""
    check_tokens(tokens)
    if hw[0] * hw[1] != tokens.shape[1]:
        raise ValueError(
            f'hw must be the size of a map of {tokens.shape[1]} tokens, got {hw}'
        )
    counts = check_counts(counts, tokens.shape[1])
    if counts != sorted(counts):
        raise ValueError(f'counts must rise, got {counts}')
    return counts
