"""The recurrent form: one program steps through a sequence and holds the whole [K, BV] state, in float32.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t

With reverse=True time runs backwards. The gradients of q, k and v are the same walk with the roles exchanged: dq is
the walk of (do, v, k) in the same direction; dv is that of (k, q, do) and dk that of (v, do, q) in the other, with the
gradient of the state as the state. That one decays on leaving a step, not on entering it:

    dS_t = exp(g_{t+1}) dS_{t+1} + scale q_t do_t^T

For the gates' gradient, dg_t = exp(g_t) <S_{t-1}, dS_t>, the walk for dq keeps the state before the last of every BT
steps, and the walk for dk takes its product with dS there. From step t + 1 to t it changes by

    scale exp(g_t) q_t^T S_{t-1} do_t - exp(g_{t+1}) k_t^T dS_{t+1} v_t

of which each walk computes one: without what step t writes and reads itself, so that they are as small as dg.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import (
    WIDEST,
    contiguous,
    final_state,
    refuse_float64,
    refuse_width,
)
from fla_ops.common.gpu.chunk_index import ChunkIndex, first_row, sequence_bounds
from fla_ops.common.gpu.decay import LOG2E, advance, factor, gate
from fla_ops.common.gpu.heads import group_sum, per_value_head
from fla_ops.common.gpu.tiles import nearest, split_program, state_tile

from .. import checks
from ..call import Call, Need, Outputs
from .gate_gradient import windowed_gate_gradient


@triton.jit
def at_edge(step, length, BT: tl.constexpr, BACKWARDS: tl.constexpr):
    """Whether the operator, maybe BACKWARDS in time, leaves a chunk with this step; its gradient enters there."""
    return step % BT == 0 if BACKWARDS else (step % BT == BT - 1) | (step == length - 1)


@triton.jit(do_not_specialize=["T"])
def fused_recurrent_kernel(
    q, k, v, g,                             # [B, T, HQ, K], [B, T, HK, K], [B, T, HV, V], [B, T, H] or [H]
    initial, o, final,                      # [N, H, K, V] or TRANSPOSED [N, H, V, K], [B, T, H, V], as initial
    kept, products,                         # [rows, H, K, V], [rows, H, value blocks]; kept is written without products
    probe, passing,                         # as v, [B, T, H, value blocks]: with o without a step's own part
    cu_seqlens, chunk_ends,                 # [N + 1], [N]
    read_scale, write_scale, T,             # on what is read from the state, and on what is written to it
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DECAY_LAST: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
):
    n, head, block = split_program((V + BV - 1) // BV, H)
    start, length = sequence_bounds(n, cu_seqlens, T)
    row = first_row(n, chunk_ends, T, BT)
    key, value = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_key, in_value = key < K, value < V
    q += head // (H // HQ) * K + key
    k += head // (H // HK) * K + key
    v += head // (H // HV) * V + value
    if passing is not None:
        probe += head // (H // HV) * V + value

    state = tl.zeros([BK, BV], tl.float32)
    at, inside = state_tile(n * H + head, 0, block * BV, K, V, BK, BV, TRANSPOSED)
    if initial is not None:
        state += tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    decay, rest = 1.0, 0.0
    if DECAY == "head" and not DECAY_LAST:
        decay, rest = factor(tl.load(g + head).to(tl.float32) * LOG2E)
    for i in range(length):
        step = length - 1 - i if REVERSE else i
        t = start + step
        if DECAY == "step" and not DECAY_LAST:
            decay, rest = factor(tl.load(g + t * H + head).to(tl.float32) * LOG2E)
        if kept is not None and products is None:
            edge = at_edge(step, length, BT, REVERSE != DECAY_LAST)
            if edge:
                at_kept, there = state_tile((row + step // BT) * H + head, 0, block * BV, K, V, BK, BV, False)
                tl.store(kept + at_kept, state, mask=there)
        keys = tl.load(k + t * (HK * K), mask=in_key, other=0.0).to(tl.float32) * write_scale
        values = tl.load(v + t * (HV * V), mask=in_value, other=0.0).to(tl.float32)
        if o is not None or passing is not None:
            queries = tl.load(q + t * (HQ * K), mask=in_key, other=0.0).to(tl.float32) * read_scale
        if passing is not None:
            out = tl.sum(state * queries[:, None], 0) * decay
            probes = tl.load(probe + t * (HV * V), mask=in_value, other=0.0).to(tl.float32)
            tl.store(passing + (t * H + head) * ((V + BV - 1) // BV) + block, tl.sum(out * probes, 0))
            out += tl.sum(keys * queries, 0) * values
            if o is not None:
                tl.store(o + (t * H + head) * V + value, nearest(out, o.dtype.element_ty), mask=in_value)
        state = advance(state, decay, rest, keys[:, None] * values[None, :], DECAY)
        if o is not None and passing is None:
            out = tl.sum(state * queries[:, None], 0)
            tl.store(o + (t * H + head) * V + value, nearest(out, o.dtype.element_ty), mask=in_value)
        if products is not None:
            edge = at_edge(step, length, BT, REVERSE != DECAY_LAST)
            if edge:
                chunk = (row + step // BT) * H + head
                at_kept, there = state_tile(chunk, 0, block * BV, K, V, BK, BV, False)
                product = tl.sum(tl.sum(state * tl.load(kept + at_kept, mask=there, other=0.0), 1), 0)
                tl.store(products + chunk * ((V + BV - 1) // BV) + block, product)
        if DECAY_LAST:
            if DECAY == "step":
                decay, rest = factor(tl.load(g + t * H + head).to(tl.float32) * LOG2E)
            elif DECAY == "head":
                decay, rest = factor(tl.load(g + head).to(tl.float32) * LOG2E)
    if DECAY_LAST and DECAY != "none":
        state = state * decay + state * rest
    if final is not None:
        tl.store(final + at, nearest(state, final.dtype.element_ty), mask=inside)


class Walk(NamedTuple):
    """One walk along every sequence and head: q, k, v in their roles, what it starts from and what it fills.

    kept receives the state before the last step of each of the index's chunks, or, with products, holds what to
    multiply with after it. passing receives the product of probe, which is like v, with o as it is without what the
    step itself writes.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    reverse: bool
    initial: Tensor | None = None
    o: Tensor | None = None  # [B, T, H, V]
    final: Tensor | None = None
    transposed: bool = False  # states are [N, H, V, K]
    read_scale: float = 1.0
    write_scale: float = 1.0
    decay_last: bool = False
    index: ChunkIndex | None = None
    kept: Tensor | None = None  # [rows, H, K, V]
    products: Tensor | None = None  # [rows, H, value blocks]
    probe: Tensor | None = None
    passing: Tensor | None = None  # [B, T, H, value blocks]


def walk(c: Call, w: Walk) -> None:
    """Launch a walk over the sequences of a call, with its decays."""
    decay, time, key_width, value_width = gate(c), w.k.shape[1], w.k.shape[3], w.v.shape[3]
    heads = max(w.q.shape[2], w.k.shape[2], w.v.shape[2])
    entry = launch.entry("fused_recurrent", w.q, key_width, value_width)
    value_block = _value_block(w.q, key_width, value_width)
    launch.run(
        fused_recurrent_kernel,
        c.sequences * heads * triton.cdiv(value_width, value_block),
        w.q, w.k, w.v, decay[0], w.initial, w.o, w.final, w.kept, w.products, w.probe, w.passing,
        c.cu_seqlens, None if w.index is None else w.index.ends, w.read_scale, w.write_scale, time,
        H=heads, HQ=w.q.shape[2], HK=w.k.shape[2], HV=w.v.shape[2], K=key_width, V=value_width,
        BT=64 if w.index is None else w.index.size, BK=launch.block(WIDEST, key_width), BV=value_block,
        DECAY=decay[1], DECAY_LAST=w.decay_last, REVERSE=w.reverse, TRANSPOSED=w.transposed, **launch.options(entry),
    )


def _value_block(q: Tensor, key_width: int, value_width: int) -> int:
    entry = launch.entry("fused_recurrent", q, key_width, value_width)
    return min(entry["BV"], triton.next_power_of_2(value_width))


def forward(c: Call):
    """o [B, T, H, V] in v's dtype, and the final state in float32 or None."""
    checks.eager(c)
    refuse_float64(c.q)
    refuse_width("K", c.q.shape[3])
    c = contiguous(c)
    final = final_state(c)
    o = torch.empty(c.v.shape, dtype=c.v.dtype, device=c.v.device)
    walk(c, Walk(c.q, c.k, c.v, c.reverse, c.initial_state, o, final, c.state_v_first, read_scale=c.factor))
    return o, final


def backward(c: Call, d: Outputs, need: Need):
    """The gradients that are needed, each in its input's dtype."""
    need_gate = need.g or need.g_gamma
    refuse_width("V", c.v.shape[3])
    c, d = contiguous(c), contiguous(d)
    q, k, v, do, initial, cu_seqlens = c.q, c.k, c.v, d.o, c.initial_state, c.cu_seqlens
    heads, turned, decay = v.shape[2], not c.state_v_first, gate(c)
    dq = dk = dg = None
    keep: dict[str, Any] = {}
    if need_gate:
        index = chunk_index.build(q.shape[0], q.shape[1], cu_seqlens, 64)
        kept = torch.empty(index.rows, heads, v.shape[3], q.shape[3], dtype=torch.float32, device=v.device)
        parts = triton.cdiv(q.shape[3], _value_block(q, v.shape[3], q.shape[3]))
        products = torch.empty(index.rows, heads, parts, dtype=torch.float32, device=v.device)
        reads, writes = (torch.empty(*v.shape[:3], parts, dtype=torch.float32, device=v.device) for _ in range(2))
        keep = {"index": index, "kept": kept, "probe": q, "passing": reads}
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device) if need.v else None
    dstate = torch.empty(initial.shape, dtype=initial.dtype, device=v.device) if need.initial_state else None
    if need.q or need_gate:
        dq = per_value_head(q, heads) if need.q else None
        past = {"initial": initial, "transposed": turned, "read_scale": c.factor}
        walk(c, Walk(do, v, k, c.reverse, o=dq, **past, **keep))
    past = {"initial": d.final_state, "write_scale": c.factor, "decay_last": True}
    if need.v or need.initial_state:
        walk(c, Walk(k, q, do, not c.reverse, o=dv, final=dstate, transposed=c.state_v_first, **past))
    if need_gate:
        keep |= {"products": products, "probe": k, "passing": writes}
    if need.k or need_gate:
        dk = per_value_head(q, heads) if need.k else None
        walk(c, Walk(v, do, q, not c.reverse, o=dk, transposed=turned, **past, **keep))
    if need_gate:
        dtype = c.g.dtype if need.g else torch.float32
        dg = windowed_gate_gradient(reads, writes, products, decay, index, cu_seqlens, c.reverse, dtype)
    return (
        group_sum(dq, q) if need.q else None,
        group_sum(dk, k) if need.k else None,
        dv,
        dg if need.g else None,
        dg.sum((0, 1)).to(c.g_gamma.dtype) if need.g_gamma else None,
        dstate,
    )
