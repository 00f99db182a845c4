"""DPC-kNN as the paper defines it, with full distance matrices.

What someone would write who takes the definition to PyTorch line by line: the
yardstick of the speed of :func:`clustr_mm.ops.dpc_knn`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clustr_mm.ops import DPCKNN


def textbook_dpc_knn(
    tokens: Tensor, num_clusters: Sequence[int], k: int = 5
) -> tuple[Tensor, ...]:
    """Cluster tokens as :func:`clustr_mm.ops.dpc_knn` does, the plain way.

    The (B, N, N) distances are computed once and serve all scales, as in the
    paper. About three such matrices exist at a time. All ties go to the lower
    token index, but they are ties of rounded numbers: distances are square
    roots in the dtype of the tokens, and densities are not logarithms. Where
    exact values tie, or nearly so, labels may differ from those of ``dpc_knn``,
    whose distances are exact. They agree for tokens whose distances have
    exact roots, and for scattered float64 tokens if ``k`` is above 2 (mutual
    nearest neighbours have equal densities if it is not).

    Args:
        tokens (Tensor): (B, N, C), floating point. Half precision is computed
            in float32.
        num_clusters (Sequence[int]): Cluster counts M, each from 1 to N.
        k (int): Neighbours that make the density, the token included.
            Defaults to 5.

    Returns:
        tuple[Tensor]: For each count the labels (B, N) int64 from 0 to M - 1;
        clusters are numbered by falling score of their centres.
    """
    if tokens.dtype != torch.float64:
        tokens = tokens.float()
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        length, channels = tokens.shape[1:]
        distance = torch.cdist(tokens, tokens) / channels**0.5
        near = distance.topk(min(k, length), dim=-1, largest=False)[0]
        density = (-near.square().mean(dim=-1)).exp()

        rank = density.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        not_denser = rank[:, None, :] >= rank[:, :, None]
        delta = distance.masked_fill(not_denser, float('inf')).amin(dim=-1)
        largest = distance.amax(dim=(1, 2)).unsqueeze(1)
        delta = torch.where(rank == 0, largest, delta)

        score = density * delta
        ranking = score.argsort(dim=1, descending=True, stable=True)
        return tuple(_join(distance, ranking[:, :count]) for count in num_clusters)


def _join(distance: Tensor, centres: Tensor) -> Tensor:
    """Labels (B, N) of the nearest of the centres (B, M) in ranking order."""
    batch, length, _ = distance.shape
    # argmin takes the first of several least values: the lower token index.
    by_index, order = centres.sort(dim=1)
    rows = by_index.unsqueeze(-1).expand(-1, -1, length)
    labels = order.gather(1, distance.gather(1, rows).argmin(dim=1))
    own = torch.arange(centres.shape[1], device=centres.device)
    return labels.scatter(1, centres, own.expand(batch, -1))


class TextbookDPCKNN(DPCKNN):
    """:class:`clustr_mm.ops.DPCKNN` by :func:`textbook_dpc_knn`."""

    def find(self, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """Labels (B, N) of tokens (B, N, C) for every count."""
        return textbook_dpc_knn(tokens, counts, self.k)
