"""Nearest-neighbour search on a GPU, with no distance in memory.

Imported only where it is to be run, see :func:`.backend.find_kernel`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F


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
    CHUNK: tl.constexpr,  # channels multiplied at a time, a divisor of CHANNELS
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
            beyond = columns[None, :] >= limit[:, None]
            distance = tl.where(beyond, float('inf'), distance)

        # Few keys are nearer than the worst one kept: take them one a row at
        # a time. Keys come by rising number, so "nearer" is strict.
        nearest = tl.min(distance, axis=1)
        waiting = tl.max((nearest < worst).to(tl.int32), axis=0)
        while waiting > 0:
            # Of equally near ones the first. tl.argmin would carry a position for
            # every distance, and the registers would not do.
            at = tl.where(distance == nearest[:, None], columns[None, :], num_keys)
            at = tl.min(at, axis=1)
            nearer = nearest < worst
            # Of the worst the one of highest number leaves.
            last = tl.max(tl.where(best == worst[:, None], place, -1), axis=1)
            leaves = (best == worst[:, None]) & (place == last[:, None])
            leaves = leaves & nearer[:, None]
            best = tl.where(leaves, nearest[:, None], best)
            place = tl.where(leaves, at[:, None], place)
            # Rows with none nearer are done, and may lose one as well.
            taken = columns[None, :] == at[:, None]
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
    """Do what :func:`.search.candidates` does.

    The positions are M - 1 in place of what is missing where a query sees fewer keys.
    """
    batch, num_queries, channels = queries.shape
    norms = keys.square().sum(dim=2)
    has_limits = limits is not None
    options = configuration(_capability(queries.device), channels, width, has_limits)
    # Zeros change no distance.
    pad = (0, options['CHANNELS'] - channels)
    found = queries.new_empty((batch, num_queries, width), dtype=torch.int32)
    grid = (triton.cdiv(num_queries, options['BLOCK_Q']) * batch,)
    with torch.cuda.device_of(queries):
        _search_kernel[grid](
            F.pad(queries, pad).contiguous(),
            F.pad(keys, pad).contiguous(),
            norms.contiguous(),
            norms if limits is None else limits.contiguous(),
            found,
            num_queries,
            keys.shape[1],
            **options,
        )
    return found.long()


def configuration(
    capability: int, channels: int, width: int, has_limits: bool
) -> dict[str, int | bool | str]:
    """The constants that the kernel is compiled with, and its warps and stages.

    Found with ``kernel_resources.py``: large blocks that spill no registers
    and leave 12 warps or more on a processor.
    """
    # Queries of a program, keys and channels of a step, warps, stages.
    if capability < 80:
        # Without tensor cores a thread multiplies alone, and limits take registers.
        shape = 64, 32 if has_limits else 64, 16, 8, 2
    elif capability // 10 == 9:
        # Four warps multiply 64 queries together; eight would not fit twice.
        shape = 64, 64, 16, 4, 3
    elif capability // 10 in (10, 11):
        # Products have their own memory. Triton 3.6 cannot do a single step.
        shape, channels = (64, 64, 32, 8, 3), max(channels, 64)
    else:
        # Ampere, Ada, and consumers' Blackwell, whose tensor cores are like theirs.
        shape = 128, 64, 16, 8, 3
    return dict(
        zip(('BLOCK_Q', 'BLOCK_K', 'CHUNK', 'num_warps', 'num_stages'), shape),
        WIDTH=width,
        SLOTS=triton.next_power_of_2(width),
        CHANNELS=triton.cdiv(channels, shape[2]) * shape[2],
        HAS_LIMITS=has_limits,
        PRECISION='tf32x3' if capability >= 80 else 'ieee',
    )


def _capability(device: torch.device) -> int:
    """Such as 86; 0 where TF32, of which it takes three products, is not known."""
    if device.type != 'cuda' or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
