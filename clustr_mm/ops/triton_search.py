"""Nearest-neighbour search on a GPU, with no distance in memory.

Imported only where it is to be run, see :func:`.backend.find_kernel`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

#: Queries of one program, and keys it looks at in one step.
BLOCK_QUERIES, BLOCK_KEYS = 64, 64

#: Channels are padded with zeros to a multiple of this, the least of tensor cores.
CHANNEL_MULTIPLE = 16


@triton.jit(do_not_specialize=['num_queries', 'num_keys'])
def _search_kernel(
    queries,  # (B, Q, CHANNELS) float32
    keys,  # (B, M, CHANNELS) float32
    norms,  # (B, M) float32
    limits,  # (B, Q) int64, or anything if not HAS_LIMITS
    found,  # (B, Q, WIDTH) int32
    num_queries,
    num_keys,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,  # WIDTH rounded up to a power of two
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,  # channels multiplied at a time
    HAS_LIMITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(num_queries, BLOCK_Q)
    # 64 bits: batch * tokens * channels may pass 2**31.
    image = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_rows = rows < num_queries
    queries += image * num_queries * CHANNELS
    keys += image * num_keys * CHANNELS
    norms += image * num_keys
    chunk = tl.arange(0, CHUNK)

    end = num_keys
    if HAS_LIMITS:
        limit = tl.load(limits + image * num_queries + rows, mask=in_rows, other=0)
        limit = limit.to(tl.int32)
        end = tl.max(limit, axis=0)

    # The SLOTS nearest so far, unordered; places beyond WIDTH stay empty. They
    # start as infinitely far keys of distinct numbers, so that one is evicted
    # at a time.
    slots = tl.arange(0, SLOTS)
    best = tl.where(slots < WIDTH, float('inf'), -float('inf'))
    best = tl.broadcast_to(best[None, :], (BLOCK_Q, SLOTS))
    place = tl.broadcast_to(slots[None, :], (BLOCK_Q, SLOTS))
    worst = tl.max(best, axis=1)

    for start in range(0, end, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        in_columns = columns < num_keys
        product = tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float32)
        for c in range(0, CHANNELS, CHUNK):
            q = tl.load(
                queries + rows[:, None] * CHANNELS + c + chunk[None, :],
                mask=in_rows[:, None],
                other=0.0,
            )
            k = tl.load(
                keys + columns[None, :] * CHANNELS + c + chunk[:, None],
                mask=in_columns[None, :],
                other=0.0,
            )
            product = tl.dot(q, k, product, input_precision=PRECISION)
        norm = tl.load(norms + columns, mask=in_columns, other=float('inf'))
        # The query's own norm is the same along the row: it changes no order.
        distance = norm[None, :] - 2 * product
        if HAS_LIMITS:
            distance = tl.where(
                columns[None, :] < limit[:, None], distance, float('inf')
            )

        # Few keys are nearer than the worst one kept: take them one a row at
        # a time. Keys come by rising number, so "nearer" is strict.
        nearest = tl.min(distance, axis=1)
        waiting = tl.max((nearest < worst).to(tl.int32), axis=0)
        while waiting > 0:
            at = start + tl.argmin(distance, axis=1)
            nearer = nearest < worst
            # Of the worst the one of highest number leaves.
            last = tl.max(tl.where(best == worst[:, None], place, -1), axis=1)
            leaves = (best == worst[:, None]) & (place == last[:, None])
            leaves = leaves & nearer[:, None]
            best = tl.where(leaves, nearest[:, None], best)
            place = tl.where(leaves, at[:, None], place)
            taken = (columns[None, :] == at[:, None]) & nearer[:, None]
            distance = tl.where(taken, float('inf'), distance)
            worst = tl.max(best, axis=1)
            nearest = tl.min(distance, axis=1)
            waiting = tl.max((nearest < worst).to(tl.int32), axis=0)

    # Where fewer keys are in, the last one fills up: it is out there.
    place = tl.where(best == float('inf'), num_keys - 1, place)
    found += image * num_queries * WIDTH
    tl.store(
        found + rows[:, None] * WIDTH + slots[None, :],
        place,
        mask=in_rows[:, None] & (slots < WIDTH)[None, :],
    )


def search(queries: Tensor, keys: Tensor, width: int, limits: Tensor | None) -> Tensor:
    """Find the keys of least float32 distance for every query.

    Args:
        queries (Tensor): (B, Q, C) float32, centred.
        keys (Tensor): (B, M, C) float32, centred.
        width (int): Keys wanted per query, at most M.
        limits (Tensor, optional): (B, Q) int64, keys from there on are out.

    Returns:
        Tensor: (B, Q, width) int64 positions among the keys, in no order; M - 1
        in place of what is missing where fewer keys are in.
    """
    batch, num_queries, channels = queries.shape
    num_keys = keys.shape[1]
    norms = keys.square().sum(dim=2)
    pad = (0, -channels % CHANNEL_MULTIPLE)
    found = queries.new_empty((batch, num_queries, width), dtype=torch.int32)
    grid = (triton.cdiv(num_queries, BLOCK_QUERIES) * batch,)
    with torch.cuda.device_of(queries):
        _search_kernel[grid](
            F.pad(queries, pad).contiguous(),
            F.pad(keys, pad).contiguous(),
            norms.contiguous(),
            norms if limits is None else limits.contiguous(),
            found,
            num_queries,
            num_keys,
            WIDTH=width,
            SLOTS=triton.next_power_of_2(width),
            CHANNELS=channels + pad[1],
            # More channels at a time would not fit the registers.
            CHUNK=32 if (channels + pad[1]) % 32 == 0 else 16,
            HAS_LIMITS=limits is not None,
            PRECISION=_precision(queries.device),
            BLOCK_Q=BLOCK_QUERIES,
            BLOCK_K=BLOCK_KEYS,
        )
    return found.long()


def _precision(device: torch.device) -> str:
    """How to multiply float32 exactly enough: never in plain TF32."""
    nvidia = device.type == 'cuda' and torch.version.hip is None
    # Three TF32 products on tensor cores are as good as a float32 one.
    ampere = nvidia and torch.cuda.get_device_capability(device) >= (8, 0)
    return 'tf32x3' if ampere else 'ieee'
