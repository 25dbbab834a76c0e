"""Gradients of the chunk form: two passes that carry the state and its gradient, then one program per chunk and head.

With W_ij = scale D_ij for j <= i, S the state before the chunk, dS the gradient that arrives after it, a_i the decay
from the chunk's start to step i, b_j from step j to its end and d over all of it:

    dq_i = sum_j W_ij (do_i . v_j) k_j + scale a_i S do_i
    dk_j = sum_i W_ij (do_i . v_j) q_i + b_j dS v_j
    dv_j = sum_i W_ij (q_i . k_j) do_i + b_j dS^T k_j

A gate at step t scales what passes it: pairs (i, j) of its chunk with j < t <= i, S on its way to the steps i >= t and
to the chunk's end, and what the steps j < t leave there. With dk_j split into x_j + y_j as above,

    dg_t = sum_{i >= t} (q_i . dq_i - k_i . x_i) + sum_{j < t} k_j . y_j + d <S, dS>

so nothing accumulates along the sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fla_ops import launch
from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import contiguous, packed_sequences
from fla_ops.common.gpu.chunk_index import locate_chunk
from fla_ops.common.gpu.decay import RESET, block_decay, gate, load_log_decay
from fla_ops.common.gpu.heads import group_sum, per_value_head
from fla_ops.common.gpu.tiles import dot, dot_state, load_rows, nearest, split_program, state_tile, store_rows

from ..call import Call, Need, Outputs, turned_gradients
from .chunk_states import Ends, chunk_states


@triton.jit
def query_key_gradient(
    q, k, v, do,                            # at this head: [time, HK, K] x 2, [time, H, V] x 2
    states, dstates, dq, dk,                # [rows, H, K, V] x 2; at this head: [time, H, K] x 2
    decay, from_start, to_end, scale,
    matrix, first, steps,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    NEED_Q: tl.constexpr, NEED_K: tl.constexpr,
):
    """Writes dq and dk where they are given; returns q_i . dq_i - k_i . x_i [BT], k_j . y_j [BT] and <S, dS>.

    What it returns is complete if both are needed.
    """
    dscores = tl.zeros([BT, BT], tl.float32)
    for value in range(0, V, BV):
        dout = load_rows(do, first, steps, value, H, V, BT, BV)
        values = load_rows(v, first, steps, value, H, V, BT, BV)
        dscores += dot(dout, tl.trans(values), PRECISION)
    dscores = nearest(dscores * decay * scale, v.dtype.element_ty)

    later = tl.zeros([BT], tl.float32)
    earlier = tl.zeros([BT], tl.float32)
    overlap = 0.0
    for key in range(0, K, BK):
        dqueries = tl.zeros([BT, BK], tl.float32)
        dkeys = tl.zeros([BT, BK], tl.float32)
        for value in range(0, V, BV):
            at, inside = state_tile(matrix, key, value, K, V, BK, BV, False)
            if NEED_Q:
                state = tl.load(states + at, mask=inside, other=0.0)
                dqueries += dot_state(load_rows(do, first, steps, value, H, V, BT, BV), tl.trans(state), PRECISION)
            if NEED_K:
                dstate = tl.load(dstates + at, mask=inside, other=0.0)
                dkeys += dot_state(load_rows(v, first, steps, value, H, V, BT, BV), tl.trans(dstate), PRECISION)
            if NEED_Q and NEED_K:
                overlap += tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1), 0)
        queries = load_rows(q, first, steps, key, HK, K, BT, BK)
        keys = load_rows(k, first, steps, key, HK, K, BT, BK)
        if NEED_Q:
            dqueries = dqueries * (scale * from_start)[:, None] + dot(dscores, keys, PRECISION)
            later += tl.sum(queries.to(tl.float32) * dqueries, 1)
            if dq is not None:
                store_rows(dq, dqueries, first, steps, key, H, K, BT, BK)
        if NEED_K:
            dkeys *= to_end[:, None]
            inner = dot(tl.trans(dscores), queries, PRECISION)
            later -= tl.sum(keys.to(tl.float32) * inner, 1)
            earlier += tl.sum(keys.to(tl.float32) * dkeys, 1)
            if dk is not None:
                store_rows(dk, dkeys + inner, first, steps, key, H, K, BT, BK)
    return later, earlier, overlap


@triton.jit
def value_gradient(
    q, k, do, dstates, dv,                  # at this head, as above; dstates [rows, H, K, V]
    decay, to_end, scale,
    matrix, first, steps,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):
    """Writes dv."""
    scores = tl.zeros([BT, BT], tl.float32)
    for key in range(0, K, BK):
        queries = load_rows(q, first, steps, key, HK, K, BT, BK)
        keys = load_rows(k, first, steps, key, HK, K, BT, BK)
        scores += dot(queries, tl.trans(keys), PRECISION)
    scores = nearest(scores * decay * scale, do.dtype.element_ty)
    for value in range(0, V, BV):
        dvalues = tl.zeros([BT, BV], tl.float32)
        for key in range(0, K, BK):
            at, inside = state_tile(matrix, key, value, K, V, BK, BV, False)
            keys = load_rows(k, first, steps, key, HK, K, BT, BK)
            dvalues += dot_state(keys, tl.load(dstates + at, mask=inside, other=0.0), PRECISION)
        dout = load_rows(do, first, steps, value, H, V, BT, BV)
        dvalues = dvalues * to_end[:, None] + dot(tl.trans(scores), dout, PRECISION)
        store_rows(dv, dvalues, first, steps, value, H, V, BT, BV)


@triton.jit(do_not_specialize=["T", "N"])
def chunk_backward_kernel(
    q, k, v, do, g,                         # [B, T, HK, K] x 2, [B, T, H, V] x 2, [B, T, H] or [H]
    states, dstates,                        # [rows, H, K, V]
    dq, dk, dv, dg,                         # [B, T, H, K] x 2, [B, T, H, V], [B, T, H]
    cu_seqlens, chunk_sequence, chunk_ends,     # [N + 1], [rows], [N]
    scale, T, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):
    row, head, _ = split_program(1, H)
    start, length, i = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps = start + i * BT, length - i * BT
    if steps <= 0:
        return
    q += head // (H // HK) * K
    k += head // (H // HK) * K
    v += head * V
    do += head * V
    matrix = row * H + head
    decay, from_start, to_end, log_total = block_decay(g, first, steps, head, H, BT, DECAY, False)
    if dv is not None:
        value_gradient(
            q, k, do, dstates, dv + head * V, decay, to_end, scale, matrix, first, steps,
            H, HK, K, V, BT, BK, BV, PRECISION,
        )
    if dq is not None or dk is not None or dg is not None:
        later, earlier, overlap = query_key_gradient(
            q, k, v, do, states, dstates, None if dq is None else dq + head * K, None if dk is None else dk + head * K,
            decay, from_start, to_end, scale, matrix, first, steps, H, HK, K, V, BT, BK, BV, PRECISION,
            dq is not None or dg is not None, dk is not None or dg is not None,
        )
        if dg is not None:
            log_decay = load_log_decay(g, first, steps, head, H, BT, DECAY)
            carried = tl.exp2(log_total) * overlap
            dlog_decay = tl.cumsum(later, 0, reverse=True) + (tl.cumsum(earlier, 0) - earlier) + carried
            dlog_decay = tl.where(log_decay <= RESET, 0.0, dlog_decay)
            t = tl.arange(0, BT)
            tl.store(dg + (first + t) * H + head, nearest(dlog_decay, dg.dtype.element_ty), mask=t < steps)


def backward(c: Call, d: Outputs, need: Need):
    """The gradients that are needed, each in its input's dtype."""
    if c.reverse:
        packed = c.cu_seqlens is not None
        return turned_gradients(backward(c.turned(), d.turned(packed), need), packed)
    c, d = contiguous(c), contiguous(d)
    q, k, v, do, cu_seqlens = c.q, c.k, c.v, d.o, c.cu_seqlens
    batch, time, key_heads, key_width = q.shape
    heads, value_width = v.shape[2:]
    decay, need_gate = gate(c), need.g or need.g_gamma
    entry = launch.entry("chunk_backward", q, key_width, value_width)
    index = chunk_index.build(batch, time, cu_seqlens, min(c.chunk_size, entry["BT"]))

    states = dstates = dstate = None
    if need.q or need_gate:
        states = chunk_states(index, c, k, v, Ends(c.initial_state))
    keep = need.k or need.v or need_gate
    if keep or need.initial_state:
        dstate = torch.empty_like(c.initial_state) if need.initial_state else None
        dstates = chunk_states(index, c, q, do, Ends(d.final_state, dstate), c.factor, reverse=True, keep=keep)
    dq, dk = (per_value_head(q, heads) if wanted else None for wanted in (need.q, need.k))
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device) if need.v else None
    dg = v.new_empty((batch, time, heads), dtype=c.g.dtype if need.g else torch.float32) if need_gate else None
    if need.q or keep:
        key_block, value_block = launch.block(entry["BK"], key_width), launch.block(entry["BV"], value_width)
        launch.run(
            chunk_backward_kernel,
            index.rows * heads,
            q, k, v, do, decay[0], states, dstates, dq, dk, dv, dg, cu_seqlens, index.sequence, index.ends,
            c.factor, time, packed_sequences(cu_seqlens),
            H=heads, HK=key_heads, K=key_width, V=value_width, BT=index.size, BK=key_block, BV=value_block,
            DECAY=decay[1], PRECISION=launch.precision(entry), **launch.options(entry),
        )
    return (
        group_sum(dq, q) if need.q else None,
        group_sum(dk, k) if need.k else None,
        dv,
        dg if need.g else None,
        dg.sum((0, 1)).to(c.g_gamma.dtype) if need.g_gamma else None,
        dstate,
    )
