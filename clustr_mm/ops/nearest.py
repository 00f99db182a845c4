"""Exact nearest-neighbour search over tokens in little memory."""

import importlib.util
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: Elements of the largest block of distances held at a time: on a CPU what
#: the cache takes (4 MiB of float32), on other devices what keeps them busy.
BLOCK_ELEMENTS = {'cpu': 2**20, 'cuda': 2**26}

#: Candidates kept beyond ``k``, so that rounding in the fast float32 search
#: cannot push a neighbour out before distances are settled in float64.
MARGIN = 3

#: Columns are searched in runs of this length: first the least distance of
#: every run, then only the runs that can hold one of the nearest.
RUN = 32

#: Channels are zero-padded to a multiple of this. Matrix products then take
#: the same instructions for every column, so equal tokens get equal distances.
CHANNEL_MULTIPLE = 16


class Points(NamedTuple):
    """Tokens prepared for the search.

    Attributes:
        exact (Tensor): (B, N, C) float32, scaled by a power of two per image;
            distances are settled on these.
        centred (Tensor): (B, N, C') float32, ``exact`` moved near the origin
            and padded with zero channels; the fast search runs on these.
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
    exact = torch.nan_to_num(tokens.float(), nan=0.0, posinf=0.0, neginf=0.0)
    if exporting():
        # Graph formats take no numbers apart; tokens of a trained network are
        # of sane size.
        centred = exact - exact.mean(dim=1, keepdim=True)
        scale = torch.ones(len(exact), dtype=torch.float64, device=exact.device)
        return Points(exact, centred, centred.square().sum(dim=-1), scale)
    exponent = torch.frexp(exact.abs().amax(dim=(1, 2), keepdim=True))[1]
    # In two steps, because 2**-149 is a float32 and 2**149 is not.
    half = exponent // 2
    exact = torch.ldexp(torch.ldexp(exact, -half), half - exponent)

    mean = exact.mean(dim=1, keepdim=True)
    spread = (exact - mean).abs().amax(dim=(1, 2), keepdim=True)
    grid = torch.ldexp(torch.ones_like(spread), torch.frexp(spread)[1] - 5)
    centred = exact - torch.round(mean / grid) * grid
    centred = F.pad(centred, (0, -centred.shape[-1] % CHANNEL_MULTIPLE))
    scale = torch.exp2(exponent.double()).flatten()
    return Points(exact, centred, centred.square().sum(dim=-1), scale)


def nearest(
    points: Points,
    k: int,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    limits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the ``k`` nearest keys of every query.

    Distances are compared in float64; of equally distant keys the one that
    stands earlier among the keys is nearer.

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

    width = min(k + MARGIN, key_exact.shape[1])
    search = _search_by_kernel if has_kernel(points.exact) else _search_by_blocks
    found = search(query_centred, key_centred, norms, width, limits)
    return _settle(query_exact, key_exact, found, k, limits)


def has_kernel(tokens: Tensor) -> bool:
    """Whether the fused search kernel takes these tokens: GPU and Triton."""
    return tokens.is_cuda and not exporting() and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec('triton') is not None


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
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


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
    """:func:`_search_by_blocks` on a GPU, with no distance in memory."""
    from .triton_nearest import search

    return search(queries, keys, norms, width, limits)


def _search_by_blocks(
    queries: Tensor, keys: Tensor, norms: Tensor, width: int, limits: Tensor | None
) -> Tensor:
    """Find the keys of least float32 distance, a block of rows at a time.

    Args:
        queries (Tensor): (B, Q, C) float32, centred.
        keys (Tensor): (B, M, C) float32, centred.
        norms (Tensor): (B, M) float32, squared norms of the keys.
        width (int): Keys wanted per query, at most M.
        limits (Tensor, optional): (B, Q) int64, keys from there on are out.

    Returns:
        Tensor: (B, Q, width) int64 positions among the keys, in no order;
        arbitrary, but at most M - 1, where fewer keys are in.
    """
    batch, num_queries, _ = queries.shape
    num_keys = keys.shape[1]
    pad = -num_keys % RUN
    keys = F.pad(keys, (0, 0, 0, pad)).transpose(1, 2)
    norms = F.pad(norms, (0, pad), value=float('inf'))
    columns = num_keys + pad

    # The rows of a block do not depend on the batch, so that an image gets
    # the same matrix products alone and in company.
    budget = block_elements(queries)
    rows = max(1, min(num_queries, budget // columns))
    images = max(1, min(batch, budget // (rows * columns)))
    found = torch.empty(
        batch, num_queries, width, dtype=torch.int64, device=queries.device
    )
    for b in range(0, batch, images):
        image = slice(b, b + images)
        for r in range(0, num_queries, rows):
            block = (image, slice(r, r + rows))
            limit = None if limits is None else limits[block]
            if limit is not None and limit.device.type == 'cpu' and not exporting():
                end = max(int(limit.max()), width)
                columns = end + -end % RUN
            found[block] = _candidates(
                queries[block],
                keys[image, :, :columns],
                norms[image, :columns],
                width,
                limit,
            )
    return found.clamp_(max=num_keys - 1)


def block_elements(tokens: Tensor) -> int:
    """Budget of one block of distances, in elements."""
    if exporting():
        # The loop over blocks would be unrolled into the graph.
        return 2**62
    return BLOCK_ELEMENTS.get(tokens.device.type, BLOCK_ELEMENTS['cuda'])


def _candidates(
    queries: Tensor, keys: Tensor, norms: Tensor, width: int, limits: Tensor | None
) -> Tensor:
    """Columns of the ``width`` least float32 distances of every row.

    Args:
        queries (Tensor): (B, R, C) centred.
        keys (Tensor): (B, C, M) centred, M a multiple of ``RUN``.
        norms (Tensor): (B, M) squared norms of the keys, infinite at padding.
        width (int): Columns wanted.
        limits (Tensor, optional): (B, R), columns from there on are out.

    Returns:
        Tensor: (B, R, width) int64.
    """
    # The query's own norm is the same along the row: it changes no order.
    values = torch.baddbmm(norms.unsqueeze(1), queries, keys, alpha=-2)
    columns = torch.arange(values.shape[-1], device=values.device)
    if limits is not None:
        values.masked_fill_(columns >= limits.unsqueeze(-1), float('inf'))
    runs = values.shape[-1] // RUN
    if runs <= width or exporting():
        return _smallest(values, columns, width)
    # The `width` first pairs (value, column) lie in the `width` runs whose
    # own first pairs come first: runs are contiguous, so ties agree too.
    values = values.unflatten(-1, (runs, RUN))
    columns = columns.view(runs, RUN)
    best = _smallest(values.amin(dim=-1), columns[:, 0] // RUN, width)
    values = values.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, RUN))
    return _smallest(values.flatten(2), columns[best].flatten(2), width)


def _settle(
    queries: Tensor, keys: Tensor, found: Tensor, k: int, limits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Order candidates by float64 distance, ties by position, and keep ``k``.

    Args:
        queries (Tensor): (B, Q, C) exact.
        keys (Tensor): (B, M, C) exact.
        found (Tensor): (B, Q, W) int64 candidate positions.
        k (int): Keys to keep, at most W.
        limits (Tensor, optional): (B, Q), keys from there on are infinitely far.

    Returns:
        tuple[Tensor, Tensor]: As :func:`nearest`.
    """
    found = found.sort(dim=-1)[0]
    batch, num_queries, width = found.shape
    distances = torch.empty(found.shape, dtype=torch.float64, device=found.device)
    rows = block_elements(queries) // (batch * width * queries.shape[-1])
    rows = max(1, min(rows, num_queries))
    for r in range(0, num_queries, rows):
        block = slice(r, r + rows)
        near = _take(keys, found[:, block].flatten(1)).double()
        near = near.unflatten(1, (-1, width))
        near -= queries[:, block].unsqueeze(2)
        distances[:, block] = near.square_().sum(dim=-1)
    if limits is not None:
        distances = distances.masked_fill(found >= limits.unsqueeze(-1), float('inf'))
    distances, order = stable_sort(distances)
    return distances[..., :k], found.gather(-1, order[..., :k])
