"""Gradients of the chunk form: a walk along each sequence and one back, then one program per chunk and head.

With S the state before the chunk, dS the gradient that arrives after it, z = beta e and y = beta f, queries and keys as
they are used:

    X = scale D * do Z^T,        Y = D * y Z^T strictly below the diagonal
    dq = X K + scale exp(P) do S^T
    dk = X^T Q - (Y + Y^T) K + exp(P_C - P) Z dS^T - exp(P) y S^T
    dbeta_j = e_j . f_j

A gate at step t scales what passes it: pairs (i, j) of its chunk with j < t <= i, S on its way to the steps i >= t and
to the chunk's end, and what the steps j < t leave there. With h = X * Q K^T - Y * K K^T below the diagonal, and what
the states give to dq and dk written as x, r and w,

    dg_t = sum_{i >= t} (sum_j h_ij - sum_j h_ji + q_i . x_i - k_i . r_i) + sum_{j < t} k_j . w_j + exp(P_C) <S, dS>

Errors, and where there are gates the states too, are taken in float32: the sums of their products nearly cancel.
No term holds what a step reads of itself, so all are as small as dg, and nothing accumulates along the sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.arguments import contiguous
from fla_ops.common.gpu.chunk_index import locate_chunk
from fla_ops.common.gpu.decay import RESET, block_decay, load_log_decay
from fla_ops.common.gpu.heads import per_value_head
from fla_ops.common.gpu.tiles import dot, load_rows, nearest, split_program, state_tile, store_rows

from ..call import Call, Need, Outputs
from .chunks import chunks_of, is_half
from .inverses import systems
from .normalization import as_given
from .products import inverse_norm, load_steps, precise_dot, rounded_dot, squared_norm
from .state_gradients import WalkBack, walk_back
from .states import Walk, kept_states, walk


@triton.jit
def norms(
    q, k,                                   # at this head: [time, HK, K] x 2
    first, steps,
    HK: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, NORMALIZE: tl.constexpr,
):
    """What the queries and the keys of a chunk are multiplied by, [BT] x 2."""
    of_query = tl.zeros([BT], tl.float32)
    of_key = tl.zeros([BT], tl.float32)
    if NORMALIZE:
        for key in range(0, K, BK):
            of_query += squared_norm(load_rows(q, first, steps, key, HK, K, BT, BK))
            of_key += squared_norm(load_rows(k, first, steps, key, HK, K, BT, BK))
    return inverse_norm(of_query, NORMALIZE), inverse_norm(of_key, NORMALIZE)


@triton.jit
def passing(
    x, y,                                   # [BT, BT] x 2: gradients of scores, of queries and of keys
    q, k,                                   # at this head: [time, HK, K] x 2
    first, steps,
    HK: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Of the pairs below the diagonal, what step t reads less what is read of it [BT]."""
    of_queries = tl.zeros([BT, BT], tl.float32)
    of_keys = tl.zeros([BT, BT], tl.float32)
    for key in range(0, K, BK):
        queries = load_rows(q, first, steps, key, HK, K, BT, BK)
        keys = load_rows(k, first, steps, key, HK, K, BT, BK)
        of_queries += dot(queries, tl.trans(keys), PRECISION)
        of_keys += dot(keys, tl.trans(keys), PRECISION)
    t = tl.arange(0, BT)
    pairs = tl.where(t[:, None] > t[None, :], x * of_queries - y * of_keys, 0.0)
    return tl.sum(pairs - tl.trans(pairs), 1)


@triton.jit(do_not_specialize=["T", "N"])
def delta_gradient_kernel(
    q, k, do, g, beta,                      # [B, T, HK, K] x 2, [B, T, H, V], [B, T, H] x 2
    errors, solved, states, dstates,        # [B, T, H, V] x 2, [rows, H, K, V] x 2
    dq, dk, dv, dg, dbeta,                  # [B, T, H, K] x 2, [B, T, H, V], [B, T, H] x 2
    scale,
    cu_seqlens, chunk_sequence, chunk_ends, # [N + 1], [rows], [N]
    T, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, NORMALIZE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):
    READ: tl.constexpr = dq is not None or dg is not None or dk is not None
    WRITTEN: tl.constexpr = dk is not None or dg is not None
    row, head, _ = split_program(1, H)
    start, length, i = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps = start + i * BT, length - i * BT
    if steps <= 0:
        return
    q += head // (H // HK) * K
    k += head // (H // HK) * K
    do += head * V
    dtype: tl.constexpr = q.dtype.element_ty
    t = tl.arange(0, BT)
    strength = load_steps(beta, first, steps, head, H, BT)

    x = tl.zeros([BT, BT], tl.float32)
    y = tl.zeros([BT, BT], tl.float32)
    products = tl.zeros([BT], tl.float32)
    for value in range(0, V, BV):
        if errors is not None:
            error = load_rows(errors + head * V, first, steps, value, H, V, BT, BV)
        if solved is not None:
            derror = load_rows(solved + head * V, first, steps, value, H, V, BT, BV)
        if dv is not None:
            store_rows(dv + head * V, derror * strength[:, None], first, steps, value, H, V, BT, BV)
        if dbeta is not None:
            products += tl.sum(error * derror, 1)
        if READ:
            dout = load_rows(do, first, steps, value, H, V, BT, BV)
            x += precise_dot(dout, tl.trans(error), HALF, PRECISION)
        if WRITTEN:
            y += precise_dot(derror, tl.trans(error), HALF, PRECISION)
    if dbeta is not None:
        tl.store(dbeta + (first + t) * H + head, nearest(products, dbeta.dtype.element_ty), mask=t < steps)
    if READ:
        asking, norm = norms(q, k, first, steps, HK, K, BT, BK, NORMALIZE)
        asking *= scale
        strength *= norm
        decay, enter, leave, log_total = block_decay(g, first, steps, head, H, BT, DECAY, False)
        x *= decay * (asking[:, None] * strength[None, :])
        y = tl.where(t[:, None] > t[None, :], y * decay, 0.0) * (strength[:, None] * strength[None, :])
        later = tl.zeros([BT], tl.float32)
        if dg is not None:
            later += passing(x, y, q, k, first, steps, HK, K, BT, BK, PRECISION)
        earlier = tl.zeros([BT], tl.float32)
        overlap = 0.0
        if WRITTEN:
            y += tl.trans(y)
        for key in range(0, K, BK):
            dqueries = tl.zeros([BT, BK], tl.float32)
            reading = tl.zeros([BT, BK], tl.float32)
            dkeys = tl.zeros([BT, BK], tl.float32)
            for value in range(0, V, BV):
                at, inside = state_tile(row * H + head, key, value, K, V, BK, BV, False)
                state = tl.load(states + at, mask=inside, other=0.0)
                dout = load_rows(do, first, steps, value, H, V, BT, BV)
                dqueries += precise_dot(dout, tl.trans(state), HALF, PRECISION)
                if WRITTEN:
                    derror = load_rows(solved + head * V, first, steps, value, H, V, BT, BV)
                    reading += precise_dot(derror, tl.trans(state), HALF, PRECISION)
                    dstate = tl.load(dstates + at, mask=inside, other=0.0)
                    error = load_rows(errors + head * V, first, steps, value, H, V, BT, BV)
                    dkeys += precise_dot(error, tl.trans(dstate), HALF, PRECISION)
                    overlap += tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1), 0)
            queries = load_rows(q, first, steps, key, HK, K, BT, BK)
            keys = load_rows(k, first, steps, key, HK, K, BT, BK)
            dqueries *= (asking * enter)[:, None]
            later += tl.sum(queries.to(tl.float32) * dqueries, 1)
            if dq is not None:
                dqueries += rounded_dot(x, keys, dtype, PRECISION)
                store_rows(dq + head * K, dqueries, first, steps, key, H, K, BT, BK)
            if WRITTEN:
                reading *= (strength * enter)[:, None]
                dkeys *= (strength * leave)[:, None]
                later -= tl.sum(keys.to(tl.float32) * reading, 1)
                earlier += tl.sum(keys.to(tl.float32) * dkeys, 1)
            if dk is not None:
                dkeys += rounded_dot(tl.trans(x), queries, dtype, PRECISION) - reading
                dkeys -= rounded_dot(y, keys, dtype, PRECISION)
                store_rows(dk + head * K, dkeys, first, steps, key, H, K, BT, BK)
        if dg is not None:
            reset = load_log_decay(g, first, steps, head, H, BT, DECAY) <= RESET
            dlog_decay = tl.cumsum(later, 0, reverse=True) + (tl.cumsum(earlier, 0) - earlier)
            dlog_decay = tl.where(reset, 0.0, dlog_decay + tl.exp2(log_total) * overlap)
            tl.store(dg + (first + t) * H + head, nearest(dlog_decay, dg.dtype.element_ty), mask=t < steps)


def backward(c: Call, d: Outputs, need: Need):
    """The gradients that are needed, each in its input's dtype."""
    c, d = contiguous(c), contiguous(d)
    chunks = chunks_of(c, back=True)
    heads, normalized = c.v.shape[2], c.use_qk_l2norm_in_kernel
    inside = need.q or need.k or need.g
    solving = need.k or need.v or need.g or need.beta
    x = systems(chunks)

    def new(like: Tensor, wanted: bool, dtype: torch.dtype | None = None) -> Tensor | None:
        return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device) if wanted else None

    states, dstates = (kept_states(chunks, exact=need.g) if wanted else None for wanted in (inside, need.k or need.g))
    errors, solved = (new(c.v, wanted, torch.float32) for wanted in (inside or need.beta, solving))
    dq, dk = (per_value_head(c.q, heads, normalized) if wanted else None for wanted in (need.q, need.k))
    dv, dbeta, dinitial = new(c.v, need.v), new(c.beta, need.beta), None
    dg = new(c.g, True) if need.g else None
    if need.initial_state:
        dinitial = new(c.initial_state, True)
    if errors is not None:
        walk(chunks, x, Walk(states=states, errors=errors))
    if solving or need.initial_state:
        walk_back(chunks, x, WalkBack(d.o, d.final_state, dinitial, dstates, solved))
    if errors is not None or solved is not None:
        key_width, value_width = c.q.shape[3], c.v.shape[3]
        entry = launch.entry("delta_gradient", c.q, key_width, value_width)
        launch.run(
            delta_gradient_kernel,
            chunks.index.rows * heads,
            c.q, c.k, d.o, c.g, c.beta, errors, solved, states, dstates, dq, dk, dv, dg, dbeta, c.factor,
            *chunks.by_row,
            H=heads, HK=c.q.shape[2], K=key_width, V=value_width, BT=chunks.index.size,
            BK=launch.block(entry["BK"], key_width), BV=launch.block(entry["BV"], value_width),
            HALF=is_half(c), PRECISION=launch.precision(entry), **chunks.flags, **launch.options(entry),
        )
    return (
        as_given(c.q, dq, normalized) if need.q else None,
        as_given(c.k, dk, normalized) if need.k else None,
        dv,
        dg,
        dbeta,
        dinitial,
    )
