"""Density-peaks clustering with k nearest neighbours (DPC-kNN)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import exporting, may_read
from .search import (
    DenseSearch,
    find_search,
    images_at_a_time,
    invert,
    to_integers,
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
    first and is nearer. The result is therefore a function of the input.
    Distances are exact for tokens rounded to whole numbers, see :mod:`.search`.

    No gradient flows, autocast does not apply, and of more than about a thousand
    tokens only a block of the N x N distances exists at a time.

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
    check_tokens(tokens)
    check_number('k', k)
    counts = check_counts(num_clusters, tokens.shape[1])
    # A graph for other runtimes gets plain operations, torch.compile one node.
    run = _dpc_knn if exporting() else torch.ops.clustr_mm.dpc_knn
    return tuple(run(tokens.detach(), counts, k))


def _dpc_knn(tokens: Tensor, num_clusters: Sequence[int], k: int) -> list[Tensor]:
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        images = tokens.split(images_at_a_time(tokens))
        labels = [_cluster(part, num_clusters, k) for part in images]
    return labels[0] if len(labels) == 1 else [torch.cat(p) for p in zip(*labels)]


def _cluster(tokens: Tensor, num_clusters: Sequence[int], k: int) -> list[Tensor]:
    """Labels (B, N) for each count, of as many images as fit in memory."""
    length, channels = tokens.shape[1:]
    integers, unit = to_integers(tokens)
    search = find_search(integers)

    # Density. It is compared by its logarithm, which neither underflows for tokens
    # far apart nor rounds to one for tokens close together.
    distances, neighbours = search.nearest(min(k, length))
    sparsity = distances.mean(dim=2) / (unit * channels)  # -log(rho)
    rank = invert(stable_sort(sparsity))

    # Distance to the nearest denser token, squared, in a unit that all tokens share.
    # The densest of all has none: by the paper it gets the largest distance there is,
    # but its score is the highest anyway.
    if isinstance(search, DenseSearch) and not may_read(rank):
        delta = search.nearest_before(rank, None, rank)
    else:
        # A denser one among the neighbours is the nearest; only the others, the local
        # peaks of the density, look at all that are denser.
        sparser = rank.gather(1, neighbours.flatten(1)).view_as(neighbours)
        sparser = sparser >= rank.unsqueeze(2)
        delta = distances.masked_fill(sparser, torch.inf).amin(dim=2)
        peaks, limits = find_peaks(delta == torch.inf, rank)
        beyond = search.nearest_before(rank, peaks, limits)
        delta = delta.scatter(1, peaks, torch.minimum(beyond, delta.gather(1, peaks)))

    # Centres, the logarithm of rho * delta falling.
    ranking = stable_sort(delta.log() / 2 - sparsity, descending=True)

    # Assignment.
    labels = []
    for count in num_clusters:
        centres, order = ranking[:, :count].sort(dim=1)
        label = order.gather(1, search.nearest_of(centres))
        own = torch.arange(count, device=tokens.device).expand_as(order)
        labels.append(label.scatter(1, ranking[:, :count], own))
    return labels


def find_peaks(peak: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (B, P) of the peaks (B, N), the denser first, and how many are denser.

    An image of fewer than P peaks has other tokens after them, with 0; so that a GPU
    need not wait for P, it is N there.
    """
    order = torch.where(peak, rank, rank + rank.shape[1]).argsort(dim=1)
    if may_read(peak):
        order = order[:, : int(peak.sum(dim=1).max())]
    return order, (rank * peak).gather(1, order)


def _fake_dpc_knn(tokens: Tensor, num_clusters: Sequence[int], k: int) -> list[Tensor]:
    return [tokens.new_empty(tokens.shape[:2], dtype=torch.int64) for _ in num_clusters]


_LIBRARY = torch.library.Library('clustr_mm', 'DEF')
_LIBRARY.define('dpc_knn(Tensor tokens, SymInt[] num_clusters, int k) -> Tensor[]')
_LIBRARY.impl('dpc_knn', _dpc_knn, 'CompositeExplicitAutograd')
# What torch.compile and the meta device run; register_fake came with torch 2.4.
_LIBRARY.impl('dpc_knn', _fake_dpc_knn, 'Meta')


def stable_sort(values: Tensor, descending: bool = False) -> Tensor:
    """Indices that sort the rows of (B, N), ties by place."""
    if exporting():
        # ONNX sorts by TopK, which is stable, but has no such argument.
        return torch.sort(values, dim=1, descending=descending)[1]
    return torch.sort(values, dim=1, descending=descending, stable=True)[1]


def check_tokens(tokens: Tensor) -> None:
    """Refuse what is no floating-point tensor (B, N, C) without an empty axis."""
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        kind = getattr(tokens, 'dtype', type(tokens).__name__)
        raise ValueError(f'tokens must be a floating-point tensor, got {kind}')
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(
            'tokens must have shape (B, N, C) with no empty axis, got '
            f'{tuple(tokens.shape)}'
        )


def check_number(name: str, value: int | None, optional: bool = False) -> None:
    """Refuse what is no integer from 1 up, nor None if that is an option."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        kind = 'None or an integer' if optional else 'an integer'
        raise ValueError(f'{name} must be {kind} from 1 up, got {value!r}')


def check_counts(num_clusters: Sequence[int], length: int) -> list[int]:
    """The counts as a list; refuse what are no counts from 1 to ``length``."""
    if not isinstance(num_clusters, Sequence):
        raise ValueError(
            f'num_clusters must be a sequence of counts, got {num_clusters!r}'
        )
    counts = list(num_clusters)
    integers = all(isinstance(count, (int, torch.SymInt)) for count in counts)
    if not counts or not integers or min(counts) < 1 or max(counts) > length:
        raise ValueError(
            f'num_clusters must be counts from 1 to N = {length}, got {counts}'
        )
    return counts
