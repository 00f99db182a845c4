"""Clusterers: what an attention asks which tokens belong together.

A clusterer is called with tokens (B, h * w, C), the size (h, w) of their map, and the
number of clusters wanted at each scale, the coarse one first. It returns labels
(B, h * w) int64 for each scale, and how many clusters there are, each label being
below that number. That is all: any class of this kind, registered in
``mmengine.registry.MODELS``, can be the ``clusterer`` of a backbone.
"""

from collections.abc import Iterator, Sequence

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from .dpc_knn import check_number, dpc_knn
from .kmeans import grid_cells, kmeans
from .merge import Clusters


@MODELS.register_module()
class DPCKNN(nn.Module):
    """Density peaks with k nearest neighbours, as in the ClusTR paper.

    See :func:`.dpc_knn`. Where as many clusters are wanted as there are tokens, every
    token is its own, in token order, and nothing is computed.

    Args:
        k (int): Neighbours that make the density of a token, itself included.
            Defaults to 5.
        window (int, optional): Most pixels per side of the windows that are clustered
            each by itself, for a cost linear in the pixels. The map is cut into the
            fewest rectangles of near-equal sides, and each gets its share of the
            clusters. (Not in the paper; kin: TCFormerV2 clusters in parts of a grid,
            arXiv 2407.11321.) 224, a usual size of pre-training, leaves images up to
            it as they are. None, the default, clusters the whole map.

    Attributes:
        stride (int): Pixels between the tokens; a backbone sets it for each stage.
    """

    def __init__(self, k: int = 5, window: int | None = None) -> None:
        super().__init__()
        check_number('k', k)
        check_number('window', window, optional=True)
        self.k = k
        self.window = window
        self.stride = 1

    def forward(
        self, tokens: Tensor, hw: tuple[int, int], counts: Sequence[int]
    ) -> Clusters:
        """Find the clusters, see :mod:`.clusterers`.

        In windows labels count on from window to window, and there may be fewer or
        more clusters than asked for.
        """
        height, width = hw
        side = max(*hw, 1)
        if self.window is not None:
            side = max(1, self.window // self.stride)
        if height <= side and width <= side:
            return Clusters(self._cluster(tokens, counts), tuple(counts))
        maps = tokens.unflatten(1, hw)
        label_maps = [
            torch.empty((len(tokens), *hw), dtype=torch.int64, device=tokens.device)
            for _ in counts
        ]
        totals = [0] * len(counts)
        # Windows come in up to four sizes; those of one size form a batch.
        for y, rows, h in split_side(height, side):
            for x, columns, w in split_side(width, side):
                place = (slice(None), slice(y, y + rows * h), slice(x, x + columns * w))
                part = maps[place].unflatten(2, (columns, w)).unflatten(1, (rows, h))
                part = part.transpose(2, 3).flatten(3, 4).flatten(0, 2)
                shares = [max(1, count * h * w // (height * width)) for count in counts]
                number = torch.arange(rows * columns, device=tokens.device)[:, None]
                for scale, labels in enumerate(self._cluster(part, shares)):
                    labels = labels.unflatten(0, (-1, rows * columns))
                    labels = labels + (number * shares[scale] + totals[scale])
                    labels = labels.unflatten(2, (h, w)).unflatten(1, (rows, columns))
                    labels = labels.transpose(2, 3).flatten(3, 4).flatten(1, 2)
                    label_maps[scale][place] = labels
                    totals[scale] += rows * columns * shares[scale]
        return Clusters(
            tuple(labels.flatten(1) for labels in label_maps), tuple(totals)
        )

    def _cluster(self, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
        length = tokens.shape[1]
        fewer = [count for count in counts if count < length]
        labels = iter(self.find(tokens, fewer) if fewer else ())
        own = torch.arange(length, device=tokens.device).expand(tokens.shape[:2])
        return tuple(next(labels) if count < length else own for count in counts)

    def find(self, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """Labels (B, N) of tokens (B, N, C) for every count, each below N."""
        return dpc_knn(tokens, counts, self.k)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f'k={self.k}, window={self.window}'


@MODELS.register_module()
class KMeans(nn.Module):
    """k-means from the cells of a grid, see :func:`.kmeans`.

    Args:
        steps (int): Steps of k-means, at least 1. Defaults to 2: one keeps of the
            tokens about as much as DPC-kNN does, two keep more, and each further one
            adds little.
    """

    def __init__(self, steps: int = 2) -> None:
        super().__init__()
        check_number('steps', steps)
        self.steps = steps

    def forward(
        self, tokens: Tensor, hw: tuple[int, int], counts: Sequence[int]
    ) -> Clusters:
        """Find clusters, see :mod:`.clusterers`; there may be fewer than wanted."""
        return Clusters(*kmeans(tokens, hw, counts, self.steps))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f'steps={self.steps}'


@MODELS.register_module()
class GridCells(nn.Module):
    """Cells of a regular grid, whatever the tokens hold: the control of an experiment.

    See :func:`.grid_cells`.
    """

    def forward(
        self, tokens: Tensor, hw: tuple[int, int], counts: Sequence[int]
    ) -> Clusters:
        """Find cells, see :mod:`.clusterers`; there may be fewer than wanted."""
        return Clusters(*grid_cells(tokens, hw, counts))


@MODELS.register_module()
class SortedTokens(nn.Module):
    """Tokens sorted by their likeness to the mean token, and cut into equal parts.

    The semantic equitable clustering of SECViT (arXiv 2405.13337): one cosine a
    token. Tokens that differ from the mean in different ways share a part.
    """

    def forward(
        self, tokens: Tensor, hw: tuple[int, int], counts: Sequence[int]
    ) -> Clusters:
        """Find the parts, see :mod:`.clusterers`."""
        likeness = F.cosine_similarity(tokens, tokens.mean(dim=1, keepdim=True), dim=2)
        return cut_order(likeness.argsort(dim=1, stable=True), counts)


def cut_order(order: Tensor, counts: Sequence[int]) -> Clusters:
    """Cut tokens in some order (B, N) into equal parts, for each scale.

    The parts of a scale differ by at most one token.
    """
    ranks = order.argsort(dim=1)
    length = order.shape[1]
    return Clusters(tuple(ranks * count // length for count in counts), tuple(counts))


def split_side(length: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Cut a side into the fewest near-equal parts of at most ``most`` tokens.

    Yields:
        tuple[int, int, int]: Start, number and length of the parts of one length.
    """
    parts = -(-length // most)
    short, longer = divmod(length, parts)
    if longer:
        yield 0, longer, short + 1
    yield longer * (short + 1), parts - longer, short
