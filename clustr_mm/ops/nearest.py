"""Exact nearest-neighbour search over tokens in little memory."""

import importlib.util
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: Elements of the largest block of distances held at a time: on a CPU what
#: the cache takes (4 MiB of float32), on other devices what keeps them busy.
BLOCK_ELEMENTS = {'cpu': 2**22, 'cuda': 2**26}

#: The part of a block that is settled at a time, such that the cache holds it.
SETTLE_SHARE = 16

#: Candidates kept beyond ``k``, so that rounding in the fast float32 search
#: cannot push a neighbour out before distances are settled in float64.
MARGIN = 3

#: Most keys of one query that may be within float32 rounding of its ``k``-th
#: nearest and are still told apart in float64, each of them.
CROWD = 256

#: Columns are searched in runs of this length: first the least distance of
#: every run, then only the runs that can hold one of the nearest.
RUN = 32

#: Tokens whose largest component has a binary exponent beyond this, up or down,
#: are scaled by a power of two, lest squares overflow or vanish.
MAX_EXPONENT = 16

#: Channels are zero-padded to a multiple of this. Matrix products then take
#: the same instructions for every column, so equal tokens get equal distances.
CHANNEL_MULTIPLE = 16


class Points(NamedTuple):
    """Tokens prepared for the search.

    Attributes:
        exact (Tensor): (B, N, C) float64, scaled by a power of two per image;
            distances are settled on these.
        centred (Tensor): (B, N, C') float32, scaled, moved near the origin and
            padded with zero channels; the fast search runs on these.
        norms (Tensor): (B, N) float32, squared norms of ``centred``.
        scale (Tensor): (B,) float64 power of two: tokens = exact * scale.
    """

    exact: Tensor
    centred: Tensor
    norms: Tensor
    scale: Tensor


def prepare(tokens: Tensor) -> Points:
    """Scale and centre tokens such that float32 distances neither overflow
    nor cancel.

    The scale is a power of two and the shift a short binary number, so small
    integers stay exact. NaN and infinite components count as zero: they give
    valid labels without a device synchronisation, and stay visible in the
    features, which are merged from the tokens as they were.

    Args:
        tokens (Tensor): (B, N, C), floating point.

    Returns:
        Points: The prepared tokens.
    """
    tokens = tokens.float()
    look = is_readable(tokens)
    low, high = tokens.amin(dim=1, keepdim=True), tokens.amax(dim=1, keepdim=True)
    if not (look and (high - low).isfinite().all()):
        tokens = torch.nan_to_num(tokens, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = tokens.amin(dim=1, keepdim=True), tokens.amax(dim=1, keepdim=True)
    mean = tokens.mean(dim=1, keepdim=True)
    if exporting():
        # Graph formats take no numbers apart; tokens of a trained network are
        # of sane size.
        centred = tokens - mean
        scale = torch.ones(len(tokens), dtype=torch.float64, device=tokens.device)
        return Points(tokens.double(), centred, centred.square().sum(dim=-1), scale)
    largest = torch.maximum(low.neg(), high).amax(dim=2, keepdim=True)
    exponent = torch.frexp(largest)[1]
    exponent = torch.where(exponent.abs() > MAX_EXPONENT, exponent, 0)
    if not look or exponent.any():
        # In two steps, because 2**-149 is a float32 and 2**149 is not.
        half = exponent // 2
        tokens, low, high = (
            torch.ldexp(torch.ldexp(x, -half), half - exponent)
            for x in (tokens, low, high)
        )
        mean = tokens.mean(dim=1, keepdim=True)

    spread = torch.maximum(high - mean, mean - low).amax(dim=2, keepdim=True)
    grid = torch.ldexp(torch.ones_like(spread), torch.frexp(spread)[1] - 5)
    centred = tokens - torch.round(mean / grid) * grid
    if centred.shape[-1] % CHANNEL_MULTIPLE:
        centred = F.pad(centred, (0, -centred.shape[-1] % CHANNEL_MULTIPLE))
    scale = torch.exp2(exponent.double()).flatten()
    exact = tokens.double()
    norms = centred.double().square().sum(dim=-1).float()
    return Points(exact, centred, norms, scale)


def nearest(
    points: Points,
    k: int,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    limits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the ``k`` nearest keys of every query.

    Distances are compared in float64; of equally distant keys the one that
    stands earlier among the keys is nearer. On a CPU this holds for all but a
    crowd: where more than ``CROWD`` keys lie within float32 rounding of the
    ``k``-th, and everywhere on other devices and in exported graphs, the
    ``k + MARGIN`` keys of least float32 distance are compared.

    Args:
        points (Points): Prepared tokens, N of them in each of B images.
        k (int): Neighbours to find, at most the number of keys.
        queries (Tensor, optional): (B, Q) int64 token indices; all tokens if
            None.
        keys (Tensor, optional): (B, M) int64 token indices; all tokens if
            None.
        limits (Tensor, optional): (B, Q) int64. Query ``i`` sees only the
            first ``limits[:, i]`` keys.

    Returns:
        tuple[Tensor, Tensor]: Squared distances (B, Q, k) float64 in units of
        ``points.exact``, rising, infinite where a query sees fewer than ``k``
        keys; and positions (B, Q, k) int64 among the keys.
    """
    query_exact, query_centred = points.exact, points.centred
    if queries is not None:
        query_exact = _take(query_exact, queries)
        query_centred = _take(query_centred, queries)
    key_exact, key_centred, norms = points.exact, points.centred, points.norms
    if keys is not None:
        key_exact = _take(key_exact, keys)
        key_centred = _take(key_centred, keys)
        norms = norms.gather(1, keys)

    batch, num_queries, _ = query_exact.shape
    num_keys = key_exact.shape[1]
    width = min(k + MARGIN, num_keys)
    starts = torch.arange(batch, device=norms.device).mul(num_keys).unsqueeze(1)
    starts = starts.expand(-1, num_queries).flatten()
    query_exact, key_exact = query_exact.flatten(0, 1), key_exact.flatten(0, 1)

    def settle(
        found: Tensor, rows: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        seen = None if limits is None else limits.flatten()[rows]
        return _settle(query_exact[rows], key_exact, found, starts[rows], k, seen)

    near, crowded = [], []
    if has_kernel(points.exact):
        found = _search_by_kernel(query_centred, key_centred, norms, width, limits)
    elif is_readable(points.exact):
        found, near, crowded = _search_certified(
            query_centred, key_centred, norms, k, width, limits
        )
    else:
        found = _search(query_centred, key_centred, norms, width, limits)
    distances, found = settle(found.flatten(0, 1))
    for rows, columns in near:
        index, inverse = torch.unique_consecutive(rows, return_inverse=True)
        distances[index], found[index] = _settle_pairs(
            query_exact[index], key_exact, inverse, columns, starts[index], k
        )
    for rows, wide in crowded:
        distances[rows], found[rows] = settle(wide, rows)
    return distances.unflatten(0, (batch, -1)), found.unflatten(0, (batch, -1))


def has_kernel(tokens: Tensor) -> bool:
    """Whether the fused search kernel takes these tokens: GPU and Triton."""
    return tokens.is_cuda and not exporting() and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    # Triton 3, without an import of it, which takes long.
    spec = importlib.util.find_spec('triton')
    folders = spec.submodule_search_locations if spec else None
    return any(Path(folder, 'backends').is_dir() for folder in folders or ())


def is_readable(tokens: Tensor) -> bool:
    """Whether a look at their numbers may save work: a GPU would have to wait."""
    return tokens.device.type == 'cpu' and not exporting()


def exporting() -> bool:
    """Whether the model is being traced into a graph to be run elsewhere."""
    # torch.compiler.is_exporting came with torch 2.7; inside torch.compile it
    # says yes as well.
    is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)
    return (
        is_exporting() and not torch.compiler.is_dynamo_compiling()
    ) or torch.onnx.is_in_onnx_export()


def stable_sort(values: Tensor, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Sort the last axis, ties by place; values and indices."""
    if exporting():
        # ONNX sorts by TopK, which is stable, but has no such argument.
        return torch.sort(values, dim=-1, descending=descending)
    return torch.sort(values, dim=-1, descending=descending, stable=True)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, Q) of ``values`` (B, N, C), as (B, Q, C)."""
    batch, length, _ = values.shape
    # Whole rows are copied at once, which gather does not know.
    starts = torch.arange(batch, device=index.device).mul(length).unsqueeze(1)
    rows = (index + starts).flatten()
    return values.flatten(0, 1).index_select(0, rows).unflatten(0, index.shape)


def _ordered_pairs(values: Tensor, index: Tensor) -> Tensor:
    """Int64 numbers that sort as the pairs (float32 value, int32 index)."""
    bits = values.view(torch.int32)
    # A float's bits sort as an integer, but for the order of negatives.
    order = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    return order.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(index)


def _smallest(values: Tensor, index: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` smallest of the last axis, ties by index."""
    if exporting():
        # Graph formats know no views of bits; ONNX breaks ties by place.
        return values.topk(k, dim=-1, largest=False)[1]
    pairs = _ordered_pairs(values, index)
    return pairs.topk(k, dim=-1, largest=False)[0].bitwise_and_(0xFFFFFFFF)


def _search_by_kernel(
    queries: Tensor, keys: Tensor, norms: Tensor, width: int, limits: Tensor | None
) -> Tensor:
    """:func:`_search` on a GPU, with no distance in memory."""
    # Triton takes long to import and not everybody has it.
    from .triton_nearest import search

    return search(queries, keys, norms, width, limits)


def _search(
    queries: Tensor, keys: Tensor, norms: Tensor, width: int, limits: Tensor | None
) -> Tensor:
    """Find the keys of least float32 distance, ties by position.

    Args:
        queries (Tensor): (B, Q, C) float32, centred.
        keys (Tensor): (B, M, C) float32, centred.
        norms (Tensor): (B, M) float32, squared norms of the keys.
        width (int): Keys to find per query, at most M.
        limits (Tensor, optional): (B, Q) int64, keys from there on are out.

    Returns:
        Tensor: (B, Q, width) int64 positions among the keys, in no order;
        arbitrary, but at most M - 1, where fewer keys are in.
    """
    shape = (*queries.shape[:2], width)
    found = torch.empty(shape, dtype=torch.int64, device=queries.device)
    for block, values in _blocks(queries, keys, norms, width, limits):
        found[block] = _first_pairs(values, width)
    return found.clamp_(max=keys.shape[1] - 1)


def _search_certified(
    queries: Tensor,
    keys: Tensor,
    norms: Tensor,
    k: int,
    width: int,
    limits: Tensor | None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """As :func:`_search`, but with as many candidates as it takes.

    What is left out of the ``k + 1`` least float32 distances is at least the
    last of them. Where that exceeds the ``k``-th by both their rounding
    errors, nothing left out belongs to the ``k`` nearest, whatever the ties.
    Where it does not, all keys that may belong to them are listed. That is a
    look at the numbers, see :func:`is_readable`.

    Args:
        queries, keys, norms, limits: As :func:`_search`.
        k (int): Keys that must be among those found.
        width (int): Keys to find where ``CROWD`` do not suffice.

    Returns:
        tuple: Positions (B, Q, min(k + 1, M)); what else to look at, as pairs
        of a row, counted over all images, and a position, by rising row; and
        rows with too many such pairs, with positions (R, width) for them.
    """
    last = keys.shape[1] - 1
    narrow = min(k + 1, keys.shape[1])
    length = torch.linalg.vector_norm(queries, dim=-1)
    longest = norms.amax(dim=1, keepdim=True).sqrt()

    found = torch.empty(*queries.shape[:2], narrow, dtype=torch.int64)
    numbers = torch.arange(found[..., 0].numel()).view(found.shape[:2])
    near, crowded = [], []
    for block, values in _blocks(queries, keys, norms, width, limits):
        least, found[block] = _least(values, narrow)
        if narrow > last:
            continue
        bound = least[..., k - 1] + _rounding(
            least[..., k - 1], length[block], longest[block[0]], queries.shape[-1]
        )
        # Not a number, where too few keys are in, is not certain either.
        unsure = (least[..., -1] > bound).logical_not_()
        if not unsure.any():
            continue
        rows, values = numbers[block][unsure], values[unsure]
        seen = values <= bound[unsure].unsqueeze(-1)
        # As bytes, whose sum takes no wider copy of them.
        runs = seen.view(torch.uint8).unflatten(-1, (-1, RUN))
        crowd = runs.sum(dim=-1, dtype=torch.uint8).sum(dim=-1) > CROWD
        crowd |= least[..., k - 1][unsure].isinf()
        if crowd.any():
            wide = _first_pairs(values[crowd].unsqueeze(0), width)[0]
            crowded.append((rows[crowd], wide))
            rows, seen = rows[~crowd], seen[~crowd]
        if len(rows):
            row, column = seen.nonzero(as_tuple=True)
            near.append((rows[row], column))
    return found.clamp_(max=last), near, crowded


def _rounding(least: Tensor, length: Tensor, longest: Tensor, channels: int) -> Tensor:
    """Bound the rounding errors of two float32 distances of one query together.

    A product of C terms is off by at most C u |q| |k| with u = 2**-24, in any
    order of summation; the norm, the sum of both and the centring of either
    end by a few u of |q|**2 and |k|**2. A key longer than the query by twice
    the ``k``-th distance is farther than that, whatever the rounding.

    Args:
        least (Tensor): (B, R) float32, ``k``-th least value as of :func:`_blocks`.
        length (Tensor): (B, R) float32, length of the queries.
        longest (Tensor): (B, 1) float32, length of the longest key.
        channels (int): C.

    Returns:
        Tensor: (B, R) float32.
    """

    def error(reach: Tensor) -> Tensor:
        both = length.square() + reach.square()
        return (channels + 8) * 2.0**-22 * length * reach + 2.0**-20 * both

    distance = (least + length.square()).clamp_min(0) + error(longest)
    return error(torch.minimum(longest, length + 2 * distance.sqrt()))


def _blocks(
    queries: Tensor, keys: Tensor, norms: Tensor, width: int, limits: Tensor | None
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Float32 distances, a block of rows at a time, images one after another.

    Args:
        queries, keys, norms, width, limits: As :func:`_search`.

    Yields:
        tuple[tuple[slice, slice], Tensor]: Images and queries of the block,
        and for each its squared distances less the query's own squared norm:
        (images, rows, columns), infinite at keys that are out. Columns are a
        multiple of ``RUN``, at least ``width``. The next block overwrites them.
    """
    batch, num_queries, _ = queries.shape
    pad = -keys.shape[1] % RUN
    if pad:
        keys = F.pad(keys, (0, 0, 0, pad))
        norms = F.pad(norms, (0, pad), value=float('inf'))
    keys = keys.transpose(1, 2)
    columns = keys.shape[2]

    # The rows of a block do not depend on the batch, so that an image gets
    # the same matrix products alone and in company.
    budget = block_elements(queries)
    rows = max(1, min(num_queries, budget // columns))
    images = max(1, min(batch, budget // (rows * columns)))
    # One buffer for all blocks: a fresh one is handed out page by page, which
    # takes longer than to fill it.
    buffer = None if exporting() else norms.new_empty(images * rows * columns)
    for b in range(0, batch, images):
        image = slice(b, b + images)
        for r in range(0, num_queries, rows):
            block = (image, slice(r, r + rows))
            query = queries[block]
            limit = None if limits is None else limits[block]
            if limit is not None and is_readable(limit):
                end = max(int(limit.max()), width)
                columns = end + -end % RUN
            shape = (*query.shape[:2], columns)
            # The query's own norm is the same along the row: it changes no order.
            values = torch.baddbmm(
                norms[image, None, :columns],
                query,
                keys[image, :, :columns],
                alpha=-2,
                out=None if buffer is None else buffer[: math.prod(shape)].view(shape),
            )
            if limit is not None:
                out = torch.arange(columns, device=limit.device) >= limit.unsqueeze(-1)
                values.masked_fill_(out, float('inf'))
            yield block, values


def block_elements(tokens: Tensor) -> int:
    """Budget of one block of distances, in elements."""
    if exporting():
        # The loop over blocks would be unrolled into the graph.
        return 2**62
    return BLOCK_ELEMENTS.get(tokens.device.type, BLOCK_ELEMENTS['cuda'])


def _least(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` least values of every row, rising, and their columns.

    Args:
        values (Tensor): (B, R, M) float32, M a multiple of ``RUN``.
        width (int): Values wanted, at most M.

    Returns:
        tuple[Tensor, Tensor]: Values and columns, (B, R, width); ties by chance.
    """
    runs = values.unflatten(-1, (-1, RUN))
    if runs.shape[2] <= width:
        return values.topk(width, dim=-1, largest=False)
    best = runs.amin(dim=-1).topk(width, dim=-1, largest=False, sorted=False)[1]
    near = runs.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, RUN))
    least, place = near.flatten(2).topk(width, dim=-1, largest=False)
    return least, best.gather(2, place // RUN).mul_(RUN).add_(place % RUN)


def _first_pairs(values: Tensor, width: int) -> Tensor:
    """Columns of the ``width`` first pairs (value, column) of every row.

    Args:
        values (Tensor): (B, R, M) float32, M a multiple of ``RUN``.
        width (int): Columns wanted.

    Returns:
        Tensor: (B, R, width) int64.
    """
    columns = torch.arange(values.shape[-1], device=values.device)
    runs = values.shape[-1] // RUN
    if runs <= width or exporting():
        return _smallest(values, columns, width)
    # They lie in the `width` runs whose own first pairs come first: runs are
    # contiguous, so ties agree too.
    values = values.unflatten(-1, (runs, RUN))
    columns = columns.view(runs, RUN)
    best = _smallest(values.amin(dim=-1), columns[:, 0] // RUN, width)
    values = values.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, RUN))
    return _smallest(values.flatten(2), columns[best].flatten(2), width)


def _settle(
    queries: Tensor,
    keys: Tensor,
    found: Tensor,
    starts: Tensor,
    k: int,
    limits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Order candidates by float64 distance, ties by position, and keep ``k``.

    Args:
        queries (Tensor): (Q, C) float64, of all images.
        keys (Tensor): (M, C) float64, of all images.
        found (Tensor): (Q, W) int64 candidate positions among the keys of the
            query's image.
        starts (Tensor): (Q,) int64, where the keys of that image start.
        k (int): Keys to keep, at most W.
        limits (Tensor, optional): (Q,), keys from there on are infinitely far.

    Returns:
        tuple[Tensor, Tensor]: Distances and positions (Q, k) as :func:`nearest`.
    """
    found = found.sort(dim=-1)[0]
    total, width = found.shape
    channels = queries.shape[-1]
    distances = queries.new_empty(found.shape)
    budget = block_elements(queries) // SETTLE_SHARE
    rows = max(1, min(budget // (width * channels), total))
    buffer = None if exporting() else keys.new_empty(rows * width, channels)
    for r in range(0, total, rows):
        block = slice(r, r + rows)
        index = (found[block] + starts[block, None]).flatten()
        out = None if buffer is None else buffer[: len(index)]
        near = torch.index_select(keys, 0, index, out=out)
        near = near.unflatten(0, (-1, width))
        near -= queries[block].unsqueeze(1)
        distances[block] = near.square_().sum(dim=-1)
    if limits is not None:
        distances = distances.masked_fill(found >= limits.unsqueeze(-1), float('inf'))
    distances, order = stable_sort(distances)
    return distances[..., :k], found.gather(-1, order[..., :k])


def _settle_pairs(
    queries: Tensor,
    keys: Tensor,
    rows: Tensor,
    columns: Tensor,
    starts: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """:func:`_settle` for as many candidates as each query has.

    Args:
        queries (Tensor): (R, C) float64.
        keys (Tensor): (M, C) float64, of all images.
        rows (Tensor): (P,) int64, rising, the query of each pair; at least
            ``k`` pairs of each.
        columns (Tensor): (P,) int64, the key of each pair among those of the
            query's image, rising for each query.
        starts (Tensor): (R,) int64, where the keys of that image start.
        k (int): Keys to keep.

    Returns:
        tuple[Tensor, Tensor]: Distances and positions (R, k) as :func:`nearest`.
    """
    distances = queries.new_empty(len(rows))
    budget = block_elements(queries) // SETTLE_SHARE
    step = max(1, budget // queries.shape[-1])
    for p in range(0, len(rows), step):
        pair = slice(p, p + step)
        difference = keys[columns[pair] + starts[rows[pair]]]
        difference -= queries[rows[pair]]
        distances[pair] = difference.square_().sum(dim=-1)
    distances, order = stable_sort(distances)
    rows, by_row = stable_sort(rows[order])
    first = torch.searchsorted(rows, torch.arange(len(queries)))
    chosen = by_row[first.unsqueeze(-1) + torch.arange(k)]
    return distances[chosen], columns[order][chosen]
