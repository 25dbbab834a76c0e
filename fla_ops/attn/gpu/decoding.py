"""One decode step of attn: each cache is split, its parts are attended to apart, and a second kernel joins them.

A part's keys decay up to its end; what the later parts add is the sum of their gates, which only the join knows. With
x_p the logarithm of part p's denominator, o_p its output and D_p the sum of the gates of all parts after p: o = sum_p
exp(x_p + D_p) o_p / sum_p exp(x_p + D_p). Parts have a fixed length, so a sequence's result does not depend on the
others, and one long cache still fills the machine.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import contiguous, refuse_float64
from fla_ops.common.gpu.chunk_index import first_row, locate_chunk
from fla_ops.common.gpu.tiles import dot, nearest, split_program

from .. import checks
from ..call import Decoding
from .parallel import WIDEST, refuse_widths
from .scores import LOG2E

NEVER = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["T", "N", "window"])
def attn_decoding_kernel(
    q, k, v, g,                             # [N, HQ, K], [T, H, K], [T, H, V], [T, HQ]
    part, log, passed,                      # [parts, HQ, V], [parts, HQ] x 2: output, log of denominator, sum of gates
    cu_seqlens, chunk_sequence, chunk_ends, # [N + 1], [parts], [N]
    stride_kt, stride_kh, stride_vt, stride_vh,
    scale, gate_scale, T, N, window,
    HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SPLIT: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):
    """One part of one cache against the query heads that share a key head, walked from its newest step."""
    GROUP: tl.constexpr = HQ // H
    row, key_head, block = split_program((GROUP + BG - 1) // BG, H)
    begin, length, i = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, SPLIT)
    first, end = i * SPLIT, tl.minimum((i + 1) * SPLIT, length)
    if WINDOW:
        first = tl.maximum(first, length - window)
    if first >= end:
        return
    n = tl.load(chunk_sequence + row).to(tl.int64)
    member = block * BG + tl.arange(0, BG)
    in_group, head = member < GROUP, key_head * GROUP + member
    key, value = tl.arange(0, BK), tl.arange(0, BV)
    at_query = q + (n * HQ + head)[:, None] * K + key[None, :]
    queries = tl.load(at_query, mask=in_group[:, None] & (key < K)[None, :], other=0.0)
    k += key_head.to(tl.int64) * stride_kh
    v += key_head.to(tl.int64) * stride_vh

    out = tl.zeros([BG, BV], tl.float32)
    total = tl.zeros([BG], tl.float32)
    gates = tl.zeros([BG], tl.float32)
    peak = tl.full([BG], -1e38, tl.float32)
    for tile in range(tl.cdiv(end - first, BN)):
        step = end - (tile + 1) * BN + tl.arange(0, BN)
        seen = step >= first
        at = begin + step
        keys = tl.load(k + at[:, None] * stride_kt + key[None, :], mask=seen[:, None] & (key < K)[None, :], other=0.0)
        x = dot(queries, tl.trans(keys), PRECISION) * scale
        if g is not None:
            later = in_group[:, None] & (seen & (step + 1 < end))[None, :]
            gate = tl.load(g + (at + 1)[None, :] * HQ + head[:, None], mask=later, other=0.0)
            gate = gate.to(tl.float32) * gate_scale
            x += gates[:, None] + tl.cumsum(gate, 1, reverse=True)
            gates += tl.sum(gate, 1)
        x = tl.where(seen[None, :], x, NEVER)
        largest = tl.maximum(peak, tl.max(x, 1))
        weights = tl.exp2(x - largest[:, None])
        shrink = tl.exp2(peak - largest)
        in_values = seen[:, None] & (value < V)[None, :]
        values = tl.load(v + at[:, None] * stride_vt + value[None, :], mask=in_values, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + dot(nearest(weights, values.dtype), values, PRECISION)
        peak = largest
    empty = total == 0.0  # every step was forgotten
    at_part = row * HQ + head
    out = out / tl.where(empty, 1.0, total)[:, None]
    tl.store(part + at_part[:, None] * V + value[None, :], out, mask=in_group[:, None] & (value < V)[None, :])
    tl.store(log + at_part, tl.where(empty, NEVER, peak + tl.log2(total)), mask=in_group)
    if g is not None:
        gates += tl.load(g + (begin + first) * HQ + head, mask=in_group, other=0.0).to(tl.float32) * gate_scale
        tl.store(passed + at_part, gates, mask=in_group)


@triton.jit(do_not_specialize=["T", "window"])
def attn_join_kernel(
    part, log, passed, sink_bias, o,        # [parts, HQ, V], [parts, HQ] x 2, [HQ], [N, HQ, V]
    cu_seqlens, chunk_ends,                 # [N + 1], [N]
    T, window,
    HQ: tl.constexpr, V: tl.constexpr, SPLIT: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, WINDOW: tl.constexpr,
):
    """The parts of one sequence and head, always from the newest to the oldest."""
    n, head, _ = split_program(1, HQ)
    length = (tl.load(cu_seqlens + n + 1) - tl.load(cu_seqlens + n)).to(tl.int32)
    start = first_row(n, chunk_ends, T, SPLIT).to(tl.int64)
    parts = tl.cdiv(length, SPLIT)
    oldest = length * 0
    if WINDOW:
        oldest = tl.maximum(length - window, 0) // SPLIT
    value = tl.arange(0, BV)

    out = tl.zeros([BV], tl.float32)
    total = tl.zeros([1], tl.float32)
    peak = tl.full([1], -1e38, tl.float32)
    gates = tl.zeros([1], tl.float64)
    for tile in range(tl.cdiv(parts - oldest, BS)):
        i = parts - (tile + 1) * BS + tl.arange(0, BS)
        seen = i >= oldest
        at = (start + i) * HQ + head
        x = tl.load(log + at, mask=seen, other=NEVER)
        if passed is not None:
            gate = tl.load(passed + at + HQ, mask=seen & (i + 1 < parts), other=0.0).to(tl.float64)
            x += (gates + tl.cumsum(gate, 0, reverse=True)).to(tl.float32)
            gates += tl.sum(gate, 0)
        largest = tl.maximum(peak, tl.max(x, 0))
        weights = tl.exp2(x - largest)
        shrink = tl.exp2(peak - largest)
        outputs = tl.load(part + at[:, None] * V + value[None, :], mask=seen[:, None] & (value < V)[None, :], other=0.0)
        total = total * shrink + tl.sum(weights, 0)
        out = out * shrink + tl.sum(weights[:, None] * outputs, 0)
        peak = largest
    if sink_bias is not None:
        sink = tl.load(sink_bias + head).to(tl.float32) * LOG2E
        largest = tl.maximum(peak, sink)
        total = total * tl.exp2(peak - largest) + tl.exp2(sink - largest)
        out = out * tl.exp2(peak - largest)
    out = out / tl.where(parts > 0, total, 1.0)
    tl.store(o + (n * HQ + head) * V + value, nearest(out, o.dtype.element_ty), mask=value < V)


def one_step(c: Decoding) -> Tensor:
    """o [1, N, HQ, V] in q's dtype; zeros where no key is seen."""
    checks.eager_decoding(c)
    refuse_float64(c.q)
    refuse_widths(c)
    _, sequences, query_heads, key_width = c.q.shape
    time, heads, value_width = c.v.shape[1:]
    o = c.q.new_empty((*c.q.shape[:3], value_width))
    if c.window_size == 0:
        return o.zero_()
    inner = tuple(name for name in ("k", "v") if getattr(c, name).stride(3) == 1)
    c = contiguous(c, but=inner)  # a cache is not copied if that can be helped
    entry, joining = (launch.entry(name, c.q, key_width, value_width) for name in ("attn_decoding", "attn_join"))
    index = chunk_index.build(1, time, c.cu_seqlens, entry["SPLIT"])
    part = o.new_empty((index.rows, query_heads, value_width), dtype=torch.float32)
    log = part.new_empty((index.rows, query_heads))
    passed = None if c.g is None else torch.empty_like(log)
    gate_scale = (c.factor if c.do_gate_scale else 1.0) * LOG2E.value
    window = time if c.window_size is None else c.window_size
    group_block = launch.block(64, query_heads // heads)
    settings = {
        "HQ": query_heads, "V": value_width, "SPLIT": entry["SPLIT"], "BV": launch.block(WIDEST, value_width),
        "WINDOW": c.window_size is not None,
    }
    launch.run(
        attn_decoding_kernel,
        index.rows * heads * triton.cdiv(query_heads // heads, group_block),
        c.q, c.k, c.v, c.g, part, log, passed, c.cu_seqlens, index.sequence, index.ends,
        *c.k.stride()[1:3], *c.v.stride()[1:3], c.factor * LOG2E.value, gate_scale, time, sequences, window,
        **settings, H=heads, K=key_width, BG=group_block, BN=entry["BN"], BK=launch.block(WIDEST, key_width),
        PRECISION=launch.precision(entry), **launch.options(entry),
    )
    launch.run(
        attn_join_kernel, sequences * query_heads,
        part, log, passed, c.sink_bias, o, c.cu_seqlens, index.ends, time, window,
        **settings, BS=joining["BS"], **launch.options(joining),
    )
    return o
