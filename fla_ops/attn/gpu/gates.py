"""Running sums of log decays for the kernels, and the gradient that comes back through them.

A sum of many steps leaves float32 too few digits for the difference of two neighbours. So the sum is taken in float64
and kept in two float32 parts, in powers of two: G = high + low, and G_i - G_j = (high_i - high_j) + (low_i - low_j) is
as exact as the difference is small. A step that forgets does not enter the sum. It bounds what is visible: a row sees
keys from the last such step on, and a key is seen by the rows before the next one. Both only ever grow along the
sequence, so they also bound the loops of the kernels.

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
from ..call import Call

FORGETS = tl.constexpr(call.FORGETS)
LOG2E = tl.constexpr(1.4426950408889634)


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


@triton.jit(do_not_specialize=["T", "TOTAL"])
def attn_decay_sums_kernel(
    g,                                  # [B, T, HQ]
    high, low, since, until,            # [HQ, TOTAL]
    cu_seqlens,                         # [N + 1]
    T, TOTAL,
    HQ: tl.constexpr, BT: tl.constexpr,
):
    n, head, _ = split_program(1, HQ)
    start, length = sequence_bounds(n, cu_seqlens, T)
    g += start * HQ + head
    base = head.to(tl.int64) * TOTAL + start
    blocks = tl.cdiv(length, BT)
    before = tl.zeros([1], tl.float64)
    last = tl.zeros([1], tl.int32)
    for block in range(blocks):
        t = block * BT + tl.arange(0, BT)
        step = tl.load(g + t.to(tl.int64) * HQ, mask=t < length, other=0.0).to(tl.float32)
        forgets = step <= FORGETS
        sums = before + tl.cumsum(tl.where(forgets, 0.0, step).to(tl.float64) * LOG2E, 0)
        rounded = sums.to(tl.float32)
        first = tl.maximum(last, tl.associative_scan(tl.where(forgets, t, 0), 0, _larger))
        tl.store(high + base + t, rounded, mask=t < length)
        tl.store(low + base + t, (sums - rounded.to(tl.float64)).to(tl.float32), mask=t < length)
        tl.store(since + base + t, first, mask=t < length)
        at_end = tl.arange(0, BT) == BT - 1
        before = tl.sum(tl.where(at_end, sums, 0.0), 0, keep_dims=True)
        last = tl.max(first, 0, keep_dims=True)
    if until is not None:
        after = tl.zeros([1], tl.int32) + length
        for block in range(blocks):
            t = (blocks - 1 - block) * BT + tl.arange(0, BT)
            following = tl.load(g + (t + 1).to(tl.int64) * HQ, mask=t + 1 < length, other=0.0).to(tl.float32)
            ends = tl.where(following <= FORGETS, t + 1, length)
            end = tl.minimum(after, tl.associative_scan(ends, 0, _smaller, reverse=True))
            tl.store(until + base + t, end, mask=t < length)
            after = tl.min(end, 0, keep_dims=True)


def decay_sums(c: Call, backward: bool = False) -> Gates:
    """The arrays for a call's g, contiguous; `until` only for the gradient."""
    if c.g is None:
        return Gates()
    batch, time, heads = c.g.shape
    shape = (heads, batch * time)
    high, low = (torch.empty(shape, dtype=torch.float32, device=c.g.device) for _ in range(2))
    since, until = (torch.empty(shape, dtype=torch.int32, device=c.g.device) for _ in range(2))
    gates = Gates(high, low, since, until if backward else None)
    entry = launch.entry("attn_decay_sums", c.g, 1, 1)
    launch.run(
        attn_decay_sums_kernel,
        c.sequences * heads,
        c.g, *gates, c.cu_seqlens, time, batch * time,
        HQ=heads, BT=entry["BT"], **launch.options(entry),
    )
    return gates


@triton.jit(do_not_specialize=["T", "TOTAL"])
def attn_decay_gradient_kernel(
    g, drow, dcolumn, dg,               # [B, T, HQ], [HQ, TOTAL] x 2, [B, T, HQ]
    cu_seqlens,                         # [N + 1]
    T, TOTAL,
    HQ: tl.constexpr, BT: tl.constexpr,
):
    """dg_t = sum_{s >= t} (drow_s - dcolumn_s), none where a step forgets."""
    n, head, _ = split_program(1, HQ)
    start, length = sequence_bounds(n, cu_seqlens, T)
    base = head.to(tl.int64) * TOTAL + start
    blocks = tl.cdiv(length, BT)
    after = tl.zeros([1], tl.float64)
    for block in range(blocks):
        t = (blocks - 1 - block) * BT + tl.arange(0, BT)
        change = tl.load(drow + base + t, mask=t < length, other=0.0).to(tl.float64)
        change -= tl.load(dcolumn + base + t, mask=t < length, other=0.0).to(tl.float64)
        at = (start + t) * HQ + head
        forgets = tl.load(g + at, mask=t < length, other=0.0).to(tl.float32) <= FORGETS
        sums = after + tl.cumsum(change, 0, reverse=True)
        found = tl.where(forgets, 0.0, sums).to(tl.float32)
        tl.store(dg + at, nearest(found, dg.dtype.element_ty), mask=t < length)
        after += tl.sum(change, 0, keep_dims=True)


def decay_gradient(c: Call, drow: Tensor, dcolumn: Tensor) -> Tensor:
    """dg [B, T, HQ] from the sums of the scores' gradient over each row and each column, [HQ, B * T]."""
    batch, time, heads = c.g.shape
    dg = torch.empty(c.g.shape, dtype=c.g.dtype, device=c.g.device)
    entry = launch.entry("attn_decay_gradient", c.g, 1, 1)
    launch.run(
        attn_decay_gradient_kernel,
        c.sequences * heads,
        c.g, drow, dcolumn, dg, c.cu_seqlens, time, batch * time,
        HQ=heads, BT=entry["BT"], **launch.options(entry),
    )
    return dg
