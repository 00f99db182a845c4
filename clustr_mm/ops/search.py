"""Distances between tokens: exact ones, and little memory.

Tokens are rounded to whole numbers (:func:`to_integers`). Squared distances of
whole numbers this small are whole numbers that float64 holds exactly, in whatever
order a matrix product adds them up; so equal distances are equal bits on every
device, alone and in a batch.

Two classes answer what the clustering asks, with the same three methods:
:class:`DenseSearch` looks at a matrix of all distances, :class:`BlockedSearch` at a
block of rows at a time, or has a kernel look at them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import exporting, find_kernel, may_read

#: Longest token, in the units that distances are computed in. A component is then
#: exact in float32, and a squared distance, at most 2**50, in float64.
RADIUS_EXPONENT = 24

#: Most tokens of an image whose distances all stand in one matrix, and most numbers
#: of such matrices at a time; images that would be too many come one after another.
DENSE_TOKENS = 1024
DENSE_ELEMENTS = {'cpu': 2**22, 'cuda': 2**27}

#: Numbers in a block: on a CPU what the cache holds, elsewhere what keeps the device
#: busy.
BLOCK_ELEMENTS = {'cpu': 2**21, 'cuda': 2**26}

#: Candidates beyond ``k``, so that rounding in the float32 search does not push a
#: neighbour out before the distances are settled in float64.
MARGIN = 3

#: The least of a row is looked for in groups of so many columns: first the least
#: of every group, then the groups where one of the nearest can be.
GROUP = 16


def to_integers(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and scale the tokens of every image, and round them to whole numbers.

    The scale is a power of two that makes the longest token about ``2**24`` long, so
    rounding moves a token by 3e-8 of that length per channel: about as much as
    float32 rounds it. Whole numbers, and multiples of a power of two, stay exact.

    Args:
        tokens (Tensor): (B, N, C), floating point. NaN and infinite components count
            as zero: the labels are valid without a look at the numbers, and the
            features, which are merged from the tokens as they were, show them.

    Returns:
        tuple[Tensor, Tensor]: (B, N, C) of whole numbers, float64 where the device
        has it; and (B, 1) the square of what tokens were multiplied with.
    """
    exact = torch.nan_to_num(tokens.to(exact_dtype(tokens)), 0.0, 0.0, 0.0)
    mean = exact.mean(dim=1, keepdim=True)
    radius = torch.linalg.vector_norm(exact - mean, dim=2).amax(dim=1)
    # Tokens that are all the same may be scaled at will.
    least = torch.finfo(exact.dtype).tiny ** 0.5
    exponent = radius.clamp_min(least).log2().floor_()
    scale = torch.exp2(RADIUS_EXPONENT - 1 - exponent).view(-1, 1, 1)
    integers = (exact * scale).round_() - (mean * scale).round_()
    return integers, scale.square().squeeze(2)


def exact_dtype(tokens: Tensor) -> torch.dtype:
    """Float64, or float32 on devices that have no float64 (Apple's)."""
    return torch.float32 if tokens.device.type == 'mps' else torch.float64


def find_search(integers: Tensor) -> 'DenseSearch | BlockedSearch':
    """The search for tokens of this number, whatever the batch."""
    # The loop over blocks would be unrolled into an exported graph.
    dense = exporting() or integers.shape[1] <= DENSE_TOKENS
    return DenseSearch(integers) if dense else BlockedSearch(integers)


def images_at_a_time(tokens: Tensor) -> int:
    """How many images of (B, N, C) tokens are clustered at once."""
    length = tokens.shape[1]
    if exporting() or length > DENSE_TOKENS:
        return len(tokens)
    return max(1, limit_of(DENSE_ELEMENTS, tokens) // length**2)


def limit_of(limits: dict[str, int], tokens: Tensor) -> int:
    """The limit for the device of the tokens."""
    return limits.get(tokens.device.type, limits['cuda'])


class DenseSearch:
    """Search in the matrix of all distances.

    Args:
        integers (Tensor): (B, N, C) of whole numbers, see :func:`to_integers`.
    """

    def __init__(self, integers: Tensor) -> None:
        self.distances = squared_distances(integers, integers)

    def nearest(self, k: int) -> tuple[Tensor, Tensor]:
        """Squared distances and indices (B, N, k) of the nearest, oneself included."""
        return self.distances.topk(k, dim=-1, largest=False)

    def nearest_before(
        self, rank: Tensor, queries: Tensor | None, limits: Tensor
    ) -> Tensor:
        """Squared distance (B, Q) to the nearest token of a rank below the limit.

        Args:
            rank (Tensor): (B, N) int64, the place of every token in a ranking.
            queries (Tensor, optional): (B, Q) int64 token indices. None for all.
            limits (Tensor): (B, Q) int64; the distance is infinite where it is 0.
        """
        distances = self.distances if queries is None else take(self.distances, queries)
        beyond = rank.unsqueeze(1) >= limits.unsqueeze(2)
        return distances.masked_fill(beyond, torch.inf).amin(dim=2)

    def nearest_of(self, chosen: Tensor) -> Tensor:
        """Which of the chosen tokens is nearest; of equally near ones the first.

        ``chosen`` are rising token indices (B, M); the result are places in it, (B, N).
        """
        # min() takes the first of several, and is faster than argmin().
        return take(self.distances, chosen).min(dim=1)[1]


class BlockedSearch:
    """Search in blocks of rows, with no matrix of all distances in memory.

    Neighbours are looked for by float32 distances, ``MARGIN`` more than asked for,
    and those found are settled by exact ones. A neighbour is missed where more than
    that many tokens lie within float32 rounding of its distance, at the cost of a
    density that is off by as much. Methods and argument are those
    of :class:`DenseSearch`.
    """

    def __init__(self, integers: Tensor) -> None:
        self.integers = integers

    def nearest(self, k: int) -> tuple[Tensor, Tensor]:
        """As :meth:`DenseSearch.nearest`."""
        distances, found = search(self.integers, self.integers, k + MARGIN)
        distances, order = distances.sort(dim=2)
        return distances[..., :k], found.gather(2, order[..., :k])

    def nearest_before(self, rank: Tensor, queries: Tensor, limits: Tensor) -> Tensor:
        """As :meth:`DenseSearch.nearest_before`."""
        ranking = take(self.integers, invert(rank))
        queries = take(self.integers, queries)
        return search(queries, ranking, 1 + MARGIN, limits)[0].amin(dim=2)

    def nearest_of(self, chosen: Tensor) -> Tensor:
        """As :meth:`DenseSearch.nearest_of`."""
        keys = take(self.integers, chosen)
        if find_kernel(keys):
            distances, found = search(self.integers, keys, 1 + MARGIN)
            nearest = distances == distances.amin(dim=2, keepdim=True)
            return torch.where(nearest, found, keys.shape[1]).amin(dim=2)
        places = chosen.new_empty(self.integers.shape[:2])
        for block in blocks(self.integers, keys.shape[1]):
            distances = squared_distances(self.integers[block], keys[block[0]])
            places[block] = distances.min(dim=2)[1]
        return places


def search(
    queries: Tensor, keys: Tensor, width: int, limits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the keys of least float32 distance, and their exact distance.

    Args:
        queries, keys (Tensor): (B, Q, C) and (B, M, C) of whole numbers.
        width (int): Keys wanted for each query, as many as there are at most.
        limits (Tensor, optional): (B, Q) int64. Query ``i`` sees only the first
            ``limits[:, i]`` keys.

    Returns:
        tuple[Tensor, Tensor]: Squared distances (B, Q, width), infinite beyond the
        limit, and positions among the keys, in no order.
    """
    width = min(width, keys.shape[1])
    kernel = find_kernel(keys)
    found = kernel and kernel(queries.float(), keys.float(), width, limits)
    if found is None:
        found = candidates(queries.float(), keys.float(), width, limits)
    distances = settle(queries, keys, found)
    if limits is not None:
        distances = distances.masked_fill(found >= limits.unsqueeze(2), torch.inf)
    return distances, found


def candidates(
    queries: Tensor, keys: Tensor, width: int, limits: Tensor | None
) -> Tensor:
    """Positions (B, Q, width) of the keys of least float32 distance.

    Arguments as of :func:`search`, but float32.
    """
    # Of the squared distance, |q|**2 - 2 q k + |k|**2, the first term is the same
    # along a row and changes no order; the last one is one more channel.
    norms = keys.square().sum(dim=2, keepdim=True)
    keys = torch.cat([-2 * keys, norms], dim=2)
    queries = F.pad(queries, (0, 1), value=1.0)
    # The last group is filled up with keys that are infinitely far.
    last = keys.shape[1] - 1
    keys = F.pad(keys, (0, 0, 0, -keys.shape[1] % GROUP))
    keys[:, last + 1 :, -1].fill_(torch.inf)
    keys = keys.transpose(1, 2)
    columns = torch.arange(keys.shape[2], device=keys.device)

    found = columns.new_empty(*queries.shape[:2], width)
    buffer = Buffer()
    for block in blocks(queries, len(columns)):
        image, rows = block
        end = len(columns)
        if limits is not None and may_read(limits):
            # No row of the block looks any further.
            most = max(int(limits[block].max()), width)
            end = most + -most % GROUP
        query = queries[block]
        out = buffer.like(query, (*query.shape[:2], end))
        with full_float32():
            distances = torch.bmm(query, keys[image, :, :end], out=out)
        if limits is not None:
            beyond = columns[:end] >= limits[block].unsqueeze(2)
            distances.masked_fill_(beyond, torch.inf)
        found[block] = least_columns(distances, width)
    return found.clamp_(max=last)


def settle(queries: Tensor, keys: Tensor, found: Tensor) -> Tensor:
    """Exact squared distances (B, Q, W) of queries to the keys found for them."""
    width, channels = found.shape[2], keys.shape[2]
    distances = queries.new_empty(found.shape)
    buffer = Buffer()
    # A few blocks at a time go round in the cache.
    share = 16 if may_read(keys) else 1
    for image, rows in blocks(queries, share * width * channels):
        index = found[image, rows].flatten(1)
        near = take(keys[image], index, buffer).unflatten(1, (-1, width))
        near -= queries[image, rows].unsqueeze(2)
        torch.sum(near.square_(), dim=3, out=distances[image, rows])
    return distances


class Buffer:
    """Memory that the blocks of a loop share.

    Fresh memory is handed out page by page, which takes longer than to fill it.
    """

    memory: Tensor | None = None

    def like(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of this shape, whatever in it."""
        length = math.prod(shape)
        if self.memory is None or len(self.memory) < length:
            self.memory = tensor.new_empty(length)
        return self.memory[:length].view(shape)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (B, N, M) of tokens (B, N, C) and (B, M, C)."""
    norms = b.square().sum(dim=2)
    distances = torch.baddbmm(norms.unsqueeze(1), a, b.transpose(1, 2), alpha=-2)
    norms = norms if a is b else a.square().sum(dim=2)
    return distances.add_(norms.unsqueeze(2))


def least_columns(distances: Tensor, width: int) -> Tensor:
    """Columns (B, R, width) of the least of rows (B, R, M), in no order.

    M is a multiple of ``GROUP``, and not below ``width``.
    """
    groups = distances.shape[2] // GROUP
    if groups <= width:
        return distances.topk(width, dim=-1, largest=False, sorted=False)[1]
    # A group is every so-many-th column, of which the least is quick to find.
    least = distances.unflatten(2, (GROUP, groups)).amin(dim=2)
    best = least.topk(width, dim=-1, largest=False, sorted=False)[1]
    steps = torch.arange(GROUP, device=best.device) * groups
    columns = (best.unsqueeze(3) + steps).flatten(2)
    near = distances.gather(2, columns)
    return columns.gather(2, near.topk(width, dim=-1, largest=False, sorted=False)[1])


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products of float32 are not rounded to TF32 meanwhile."""
    matmul = torch.backends.cuda.matmul
    # The setting of torch 2.9; older ones do not know it.
    name, full = 'fp32_precision', 'ieee'
    if not hasattr(matmul, name):
        name, full = 'allow_tf32', False
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def blocks(queries: Tensor, width: int) -> Iterator[tuple[slice, slice]]:
    """Images and rows of (B, Q, ...), so many that ``width`` numbers for each row stay
    in the limit of a block."""
    batch, length = queries.shape[:2]
    limit = limit_of(BLOCK_ELEMENTS, queries)
    rows = max(1, min(length, limit // width))
    images = max(1, min(batch, limit // (rows * width)))
    for b in range(0, batch, images):
        for r in range(0, length, rows):
            yield slice(b, b + images), slice(r, r + rows)


def take(values: Tensor, index: Tensor, buffer: Buffer | None = None) -> Tensor:
    """Rows ``index`` (B, Q) of ``values`` (B, N, C), as (B, Q, C)."""
    shape = (*index.shape, values.shape[2])
    if not may_read(values):
        return values.gather(1, index.unsqueeze(2).expand(shape))
    # A CPU is faster at copying whole rows, which gather() does not know.
    rows = index + torch.arange(len(index)).unsqueeze(1) * values.shape[1]
    out = buffer.like(values, (rows.numel(), shape[2])) if buffer else None
    values = values.flatten(0, 1)
    return torch.index_select(values, 0, rows.flatten(), out=out).view(shape)


def invert(permutation: Tensor) -> Tensor:
    """Inverse of the permutations in the rows of a (B, N) int64 tensor."""
    places = torch.arange(permutation.shape[1], device=permutation.device)
    return torch.empty_like(permutation).scatter_(
        1, permutation, places.expand_as(permutation)
    )
