"""Running sums of log decays for the kernels, and the gradient that comes back through them.

A sum of many steps leaves float32 too few digits for the difference of two neighbours. So the sum is taken in float64
and kept in two float32 parts, in powers of two: G = high + low, and G_i - G_j = (high_i - high_j) + (low_i - low_j) is
as exact as the difference is small. A step that forgets does not enter the sum. It bounds what is visible: a row sees
keys from the last such step on, and a key is seen by the rows before the next one. Both only ever grow along the
sequence, so they also bound the loops of the kernels. All of this is done in two passes over blocks of steps, so that
one long sequence fills the machine: what each block adds up to, then each block's own sums behind those before it.

Arrays here are [HQ, B * T]: a head's steps lie side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.chunk_index import sequence_bounds
from fla_ops.common.gpu.tiles import nearest, split_program

from .. import call
from ..call import Call, Prefill
from .scores import LOG2E

FORGETS = tl.constexpr(call.FORGETS)


class Gates(NamedTuple):
    """What the kernels read of g; all None without decay."""

    high: Tensor | None = None  # [HQ, B * T] float32
    low: Tensor | None = None  # [HQ, B * T] float32
    since: Tensor | None = None  # [HQ, B * T] int32: the first key that a row sees, in its sequence
    until: Tensor | None = None  # [HQ, B * T] int32: one past the last row that sees a key, in its sequence


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def locate_block(row, cu_seqlens, T, N, BT: tl.constexpr, BP: tl.constexpr):
    """The sequence's first step (int64) and length, which of its blocks lies in this row, and the row of its first.

    Packed sequence n begins in row cu_seqlens[n] // BT + n: its blocks fit in front of the next one's, and no row has
    to be looked up. In an unused row the block lies past the sequence's end.
    """
    if cu_seqlens is not None:
        n = tl.full([], -1, tl.int32)
        for first in range(0, N, BP):
            i = first + tl.arange(0, BP)
            begins = tl.load(cu_seqlens + i, mask=i < N, other=0).to(tl.int64) // BT + i
            n += tl.sum(((i < N) & (begins <= row)).to(tl.int32), 0)
        start, length = sequence_bounds(n, cu_seqlens, T)
        origin = start // BT + n
    else:
        blocks = tl.cdiv(T, BT)
        start, length, origin = row // blocks * T, T, row // blocks * blocks
    return start, length, (row - origin).to(tl.int32), origin


@triton.jit
def sum_of(totals, begin, end, BP: tl.constexpr):
    """totals[begin] + ... + totals[end - 1], [1], always in the same order."""
    found = tl.zeros([1], tl.float64)
    for first in range(begin, end, BP):
        i = first + tl.arange(0, BP)
        found += tl.sum(tl.load(totals + i, mask=i < end, other=0.0), 0, keep_dims=True)
    return found


@triton.jit(do_not_specialize=["T", "N", "ROWS"])
def attn_decay_totals_kernel(
    g,                                  # [B, T, HQ]
    totals, newest, oldest,             # [HQ, ROWS] x 3
    cu_seqlens,                         # [N + 1]
    T, N, ROWS,
    HQ: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr,
):
    """Of each block: the sum of the steps that do not forget, and the last (else 0) and the first (else the sequence's
    length) of those that do.
    """
    row, head, _ = split_program(1, HQ)
    start, length, block, _ = locate_block(row, cu_seqlens, T, N, BT, BP)
    t = block * BT + tl.arange(0, BT)
    step = tl.load(g + (start + t) * HQ + head, mask=t < length, other=0.0).to(tl.float32)
    forgets = step <= FORGETS
    at = head.to(tl.int64) * ROWS + row
    tl.store(totals + at, tl.sum(tl.where(forgets, 0.0, step).to(tl.float64), 0))
    tl.store(newest + at, tl.max(tl.where(forgets, t, 0), 0))
    tl.store(oldest + at, tl.min(tl.where(forgets, t, length), 0))


@triton.jit(do_not_specialize=["T", "N", "ROWS", "TOTAL"])
def attn_decay_sums_kernel(
    g,                                  # [B, T, HQ]
    totals, newest, oldest,             # [HQ, ROWS] x 3
    high, low, since, until,            # [HQ, TOTAL]
    cu_seqlens,                         # [N + 1]
    T, N, ROWS, TOTAL,
    HQ: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr,
):
    row, head, _ = split_program(1, HQ)
    start, length, block, origin = locate_block(row, cu_seqlens, T, N, BT, BP)
    if block * BT >= length:
        return
    g += start * HQ + head
    base = head.to(tl.int64) * TOTAL + start
    blocks = head.to(tl.int64) * ROWS + origin  # where those of the sequence lie
    t = block * BT + tl.arange(0, BT)
    inside = t < length

    before = sum_of(totals + blocks, 0, block, BP)
    last = tl.zeros([1], tl.int32)
    for first in range(0, block, BP):
        i = first + tl.arange(0, BP)
        last = tl.maximum(last, tl.max(tl.load(newest + blocks + i, mask=i < block, other=0), 0, keep_dims=True))
    step = tl.load(g + t.to(tl.int64) * HQ, mask=inside, other=0.0).to(tl.float32)
    forgets = step <= FORGETS
    sums = (before + tl.cumsum(tl.where(forgets, 0.0, step).to(tl.float64), 0)) * LOG2E
    rounded = sums.to(tl.float32)
    tl.store(high + base + t, rounded, mask=inside)
    tl.store(low + base + t, (sums - rounded.to(tl.float64)).to(tl.float32), mask=inside)
    seen_from = tl.maximum(last, tl.associative_scan(tl.where(forgets, t, 0), 0, _larger))
    tl.store(since + base + t, seen_from, mask=inside)

    if until is not None:
        after = tl.zeros([1], tl.int32) + length
        count = tl.cdiv(length, BT)
        for first in range(block + 1, count, BP):
            i = first + tl.arange(0, BP)
            ends = tl.load(oldest + blocks + i, mask=i < count, other=length)
            after = tl.minimum(after, tl.min(ends, 0, keep_dims=True))
        following = (t + 1 < length) & (tl.arange(0, BT) < BT - 1)
        next_step = tl.load(g + (t + 1).to(tl.int64) * HQ, mask=following, other=0.0).to(tl.float32)
        ends = tl.where(next_step <= FORGETS, t + 1, length)
        end = tl.minimum(after, tl.associative_scan(ends, 0, _smaller, reverse=True))
        tl.store(until + base + t, end, mask=inside)


def decay_sums(c: Call | Prefill, backward: bool = False) -> Gates:
    """The arrays for a call's g, contiguous; `until` only for the gradient."""
    if c.g is None:
        return Gates()
    batch, time, heads = c.g.shape
    shape = (heads, batch * time)
    high, low = (torch.empty(shape, dtype=torch.float32, device=c.g.device) for _ in range(2))
    since, until = (torch.empty(shape, dtype=torch.int32, device=c.g.device) for _ in range(2))
    gates = Gates(high, low, since, until if backward else None)
    entry = launch.entry("attn_decay_sums", c.g, 1, 1)
    rows, call = _blocks(c, entry)
    totals = torch.empty(heads, rows, dtype=torch.float64, device=c.g.device)
    newest, oldest = (torch.empty(heads, rows, dtype=torch.int32, device=c.g.device) for _ in range(2))
    blocks, sizes = (totals, newest, oldest), (c.key_offsets, time, c.sequences, rows)
    launch.run(attn_decay_totals_kernel, rows * heads, c.g, *blocks, *sizes, **call)
    launch.run(attn_decay_sums_kernel, rows * heads, c.g, *blocks, *gates, *sizes, batch * time, **call)
    return gates


def _blocks(c: Call | Prefill, entry: launch.Entry) -> tuple[int, dict[str, int]]:
    """How many rows hold all blocks of steps, and constants of the kernels that walk them."""
    steps = entry["BT"]
    if c.key_offsets is None:
        rows = c.g.shape[0] * triton.cdiv(c.g.shape[1], steps)
    else:
        rows = c.g.shape[1] // steps + c.sequences
    return rows, {"HQ": c.g.shape[2], "BT": steps, "BP": entry["BP"], **launch.options(entry)}


@triton.jit(do_not_specialize=["T", "N", "ROWS", "TOTAL"])
def attn_change_totals_kernel(
    drow, dcolumn, totals,              # [HQ, TOTAL] x 2, [HQ, ROWS]
    cu_seqlens,                         # [N + 1]
    T, N, ROWS, TOTAL,
    HQ: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr,
):
    """The sum of drow - dcolumn over each block."""
    row, head, _ = split_program(1, HQ)
    start, length, block, _ = locate_block(row, cu_seqlens, T, N, BT, BP)
    at = head.to(tl.int64) * TOTAL + start + block * BT
    if drow is not None:
        drow += at
    change = load_change(drow, dcolumn + at, length - block * BT, BT)
    tl.store(totals + head.to(tl.int64) * ROWS + row, tl.sum(change, 0))


@triton.jit
def load_change(drow, dcolumn, steps, BT: tl.constexpr):
    """drow - dcolumn of the `steps` steps of a block, [BT] in float64, zero past them; drow may be None."""
    t = tl.arange(0, BT)
    change = -tl.load(dcolumn + t, mask=t < steps, other=0.0).to(tl.float64)
    if drow is not None:
        change += tl.load(drow + t, mask=t < steps, other=0.0).to(tl.float64)
    return change


@triton.jit(do_not_specialize=["T", "N", "ROWS", "TOTAL"])
def attn_decay_gradient_kernel(
    g, drow, dcolumn, totals, dg,       # [B, T, HQ], [HQ, TOTAL] x 2, [HQ, ROWS], [B, T, HQ]
    cu_seqlens,                         # [N + 1]
    T, N, ROWS, TOTAL,
    HQ: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr,
):
    """dg_t = sum_{s >= t} (drow_s - dcolumn_s), none where a step forgets.

    Without drow, all rows come after all columns: what they add to the last sum is what the columns take from the
    others, and dg_t = sum_{s < t} dcolumn_s.
    """
    row, head, _ = split_program(1, HQ)
    start, length, block, origin = locate_block(row, cu_seqlens, T, N, BT, BP)
    steps = length - block * BT
    if steps <= 0:
        return
    first = head.to(tl.int64) * TOTAL + start + block * BT
    blocks = head.to(tl.int64) * ROWS + origin  # where those of the sequence lie
    if drow is not None:
        change = load_change(drow + first, dcolumn + first, steps, BT)
        sums = sum_of(totals + blocks, block + 1, tl.cdiv(length, BT), BP) + tl.cumsum(change, 0, reverse=True)
    else:
        change = load_change(drow, dcolumn + first, steps, BT)
        sums = change - (sum_of(totals + blocks, 0, block, BP) + tl.cumsum(change, 0))
    t = tl.arange(0, BT)
    at = (start + block * BT + t) * HQ + head
    forgets = tl.load(g + at, mask=t < steps, other=0.0).to(tl.float32) <= FORGETS
    found = tl.where(forgets, 0.0, sums).to(tl.float32)
    tl.store(dg + at, nearest(found, dg.dtype.element_ty), mask=t < steps)


def decay_gradient(c: Call | Prefill, drow: Tensor | None, dcolumn: Tensor) -> Tensor:
    """dg [B, TK, HQ] from the sums of the scores' gradient over each row and each column, [HQ, B * TK]; those over rows
    are None where rows come after all columns.
    """
    batch, time, heads = c.g.shape
    dg = torch.empty(c.g.shape, dtype=c.g.dtype, device=c.g.device)
    rows, call = _blocks(c, launch.entry("attn_decay_gradient", c.g, 1, 1))
    totals = torch.empty(heads, rows, dtype=torch.float64, device=c.g.device)
    changes, sizes = (drow, dcolumn, totals), (c.key_offsets, time, c.sequences, rows, batch * time)
    launch.run(attn_change_totals_kernel, rows * heads, *changes, *sizes, **call)
    launch.run(attn_decay_gradient_kernel, rows * heads, c.g, *changes, dg, *sizes, **call)
    return dg
