"""Decays of their own for each channel inside a chunk, as device functions.

The weight of step j at step i, exp(g_{j+1} + ... + g_i), differs from channel to channel, so it has to ride on the
two factors of a product over channels. Cut the chunk in two halves: a pair of steps in different halves meets at the
boundary b, exp(g_{j+1} + ... + g_b) goes with j and exp(g_{b+1} + ... + g_i) with i. Pairs in the same half are cut
again, down to halves of one step. On the level of halves of HALF steps every step has one factor: from the boundary
before it if its half is the later of two, else to the boundary after it. These sums grow from level to level by the
total of the neighbouring half; nothing is ever subtracted, so no exponent is positive where no gate is, and a gate of
-inf is a factor of zero.

Steps i are rows and channels columns. REVERSE exchanges the roles of the halves: earlier steps read from later ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_ops.common.gpu.decay import LOG2E
from fla_ops.common.gpu.tiles import dot, load_rows


@triton.jit
def load_log_decays(g, first, steps, column, H: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr):
    """Exponents of two [BT, BM] of the `steps` steps from `first`, zero past them.

    g lies at one head of [time, H, M].
    """
    return load_rows(g, first, steps, column, H, M, BT, BM).to(tl.float32) * LOG2E


@triton.jit
def from_start(g, first, steps, column, H: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr):
    """The decay from the chunk's start to each step, [BT, BM]."""
    return tl.exp2(tl.cumsum(load_log_decays(g, first, steps, column, H, M, BT, BM), 0))


@triton.jit
def to_end(g, first, steps, column, H: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr):
    """The decay from each step to the chunk's end, [BT, BM]: that of the steps after it."""
    rest = load_log_decays(g, first + 1, tl.minimum(steps, BT) - 1, column, H, M, BT, BM)
    return tl.exp2(tl.cumsum(rest, 0, reverse=True))


@triton.jit
def later(HALF: tl.constexpr, BT: tl.constexpr):
    """Which steps lie in the later of two halves, [BT, 1]."""
    return (tl.arange(0, BT)[:, None] // HALF) % 2 == 1


@triton.jit
def meeting(HALF: tl.constexpr, BT: tl.constexpr, REVERSE: tl.constexpr):
    """Which steps j [BT columns] each step i [BT rows] meets on this level."""
    i, j = tl.arange(0, BT)[:, None] // HALF, tl.arange(0, BT)[None, :] // HALF
    if REVERSE:
        return (j == i + 1) & (i % 2 == 0)
    else:
        return (i == j + 1) & (j % 2 == 0)


@triton.jit
def block_total(x, SIZE: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr):
    """The sum over each block of SIZE rows, in every row of the block."""
    blocks = tl.sum(tl.reshape(x, [BT // SIZE, SIZE, BM]), 1)
    return tl.reshape(tl.broadcast_to(blocks[:, None, :], [BT // SIZE, SIZE, BM]), [BT, BM])


@triton.jit
def grow(log_decay, prefix, suffix, HALF: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr):
    """prefix, from a block's start to each step, and suffix, from each step to its block's end, for blocks of twice
    the size.
    """
    late = later(HALF, BT)
    early_total = block_total(tl.where(late, 0.0, log_decay), 2 * HALF, BT, BM)
    late_total = block_total(tl.where(late, log_decay, 0.0), 2 * HALF, BT, BM)
    return tl.where(late, prefix + early_total, prefix), tl.where(late, suffix, suffix + late_total)


@triton.jit
def sum_before(x, BT: tl.constexpr, BM: tl.constexpr, LEVELS: tl.constexpr):
    """The sum over the steps before each one."""
    total = tl.zeros([BT, BM], tl.float32)
    for level in tl.static_range(LEVELS):
        late = later(1 << level, BT)
        total += tl.where(late, block_total(tl.where(late, 0.0, x), 2 << level, BT, BM), 0.0)
    return total


@triton.jit
def contract_levels(
    readers, writers, log_decay,    # [BT, BM] x 3, float32
    BT: tl.constexpr, BM: tl.constexpr, LEVELS: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):
    """sum_m readers_im exp(P_im - P_jm) writers_jm for each step i and the steps j it sees, [BT, BT]."""
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    product = tl.where(i == j, tl.sum(readers * writers, 1)[:, None], 0.0)
    prefix, suffix = log_decay, tl.zeros([BT, BM], tl.float32)
    for level in tl.static_range(LEVELS):
        factor = tl.exp2(tl.where(later(1 << level, BT), prefix, suffix))
        block = dot(readers * factor, tl.trans(writers * factor), PRECISION)
        product += tl.where(meeting(1 << level, BT, REVERSE), block, 0.0)
        if level + 1 < LEVELS:
            prefix, suffix = grow(log_decay, prefix, suffix, 1 << level, BT, BM)
    return product


@triton.jit
def spread_levels(
    scores, writers, log_decay,     # [BT, BT], [BT, BM] x 2, float32
    BT: tl.constexpr, BM: tl.constexpr, LEVELS: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):
    """sum_j scores_ij exp(P_im - P_jm) writers_jm over the steps j that i sees but itself, [BT, BM]."""
    spread = tl.zeros([BT, BM], tl.float32)
    prefix, suffix = log_decay, tl.zeros([BT, BM], tl.float32)
    for level in tl.static_range(LEVELS):
        factor = tl.exp2(tl.where(later(1 << level, BT), prefix, suffix))
        met = tl.where(meeting(1 << level, BT, REVERSE), scores, 0.0)
        spread += factor * dot(met, writers * factor, PRECISION)
        if level + 1 < LEVELS:
            prefix, suffix = grow(log_decay, prefix, suffix, 1 << level, BT, BM)
    return spread


@triton.jit
def diagonal(scores, BT: tl.constexpr):
    """scores_ii, [BT]."""
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return tl.sum(tl.where(i == j, scores, 0.0), 1)
