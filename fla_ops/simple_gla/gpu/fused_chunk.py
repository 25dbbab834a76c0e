"""The fused chunk form: one program walks the chunks of a sequence and holds the whole [K, BV] state.

    o_i = scale (sum_{j <= i} D_ij (q_i . k_j) v_j + a_i S^T q_i)
    S'  = d S + sum_j b_j k_j v_j^T

The gradients of q, k and v are the same walk with the roles exchanged: dq is the walk of (do, v, k), dv that of (k, q,
do) and dk that of (v, do, q) backwards in time, with the gradient of the state as the state. The gradient of a gate
would be a difference of two such results summed along the whole sequence, in which 16-bit rounding adds up: with gates
the chunk form's gradient is used instead, which is exact inside each chunk and reads less. So are the chunk form's
kernels where a state is too wide for one program.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.arguments import contiguous, final_state, refuse_float64
from fla_ops.common.gpu.chunk_index import sequence_bounds
from fla_ops.common.gpu.decay import block_decay, decayed, gate
from fla_ops.common.gpu.heads import group_sum, per_value_head
from fla_ops.common.gpu.tiles import dot, load_rows, nearest, split_program, state_tile, store_rows

from .. import checks
from ..call import Call, Need, Outputs, turned_gradients
from . import chunk


@triton.jit
def dot_carried(a, state, PRECISION: tl.constexpr):
    """a state, for a state in float32, which is multiplied in a's dtype. Beside float16 it is shrunk into its range."""
    if a.dtype == tl.float16:
        size = tl.max(tl.max(tl.abs(state), 1), 0)
        shrink = tl.exp2(-tl.maximum(tl.ceil(tl.log2(size)) - 15.0, 0.0))
        return dot(a, nearest(state * shrink, a.dtype), PRECISION) / shrink
    else:
        return dot(a, nearest(state, a.dtype), PRECISION)


@triton.jit(do_not_specialize=["T"])
def fused_chunk_kernel(
    q, k, v, g,                             # [B, T, HQ, K], [B, T, HK, K], [B, T, HV, V], [B, T, H] or [H]
    initial, o, final,                      # [N, H, K, V] or TRANSPOSED [N, H, V, K], [B, T, H, V], as initial
    cu_seqlens,                             # [N + 1]
    read_scale, write_scale, T,             # on what is read from the state, and on what is written to it
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
):
    n, head, block = split_program((V + BV - 1) // BV, H)
    value = block * BV
    start, length = sequence_bounds(n, cu_seqlens, T)
    q += head // (H // HQ) * K
    k += head // (H // HK) * K
    v += head // (H // HV) * V

    state = tl.zeros([BK, BV], tl.float32)
    at, inside = state_tile(n * H + head, 0, value, K, V, BK, BV, TRANSPOSED)
    if initial is not None:
        state += tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    chunks = tl.cdiv(length, BT)
    for c in range(chunks):
        i = chunks - 1 - c if REVERSE else c
        first, steps = start + i * BT, length - i * BT
        keys = load_rows(k, first, steps, 0, HK, K, BT, BK)
        values = load_rows(v, first, steps, value, HV, V, BT, BV)
        if o is not None:
            queries = load_rows(q, first, steps, 0, HQ, K, BT, BK)
            out = dot_carried(queries, state, PRECISION)
            scores = dot(queries, tl.trans(keys), PRECISION)
        decay, enter, leave, log_total = block_decay(g, first, steps, head, H, BT, DECAY, REVERSE)
        written = nearest(values * (leave * write_scale)[:, None], values.dtype)
        state = decayed(state, log_total, DECAY) + dot(tl.trans(keys), written, PRECISION)
        if o is not None:
            scores = nearest(scores * (decay * write_scale), values.dtype)
            out = out * enter[:, None] + dot(scores, values, PRECISION)
            store_rows(o + head * V, out * read_scale, first, steps, value, H, V, BT, BV)
    if final is not None:
        tl.store(final + at, nearest(state, final.dtype.element_ty), mask=inside)


class Walk(NamedTuple):
    """One walk along every sequence and head: q, k, v in their roles, what it starts from and what it fills."""

    q: Tensor
    k: Tensor
    v: Tensor
    initial: Tensor | None = None
    o: Tensor | None = None  # [B, T, H, V]
    final: Tensor | None = None
    transposed: bool = False  # states are [N, H, V, K]
    read_scale: float = 1.0
    write_scale: float = 1.0
    reverse: bool = False


def walk(c: Call, w: Walk) -> None:
    """Launch a walk over the sequences of a call, with its decays."""
    decay, time, key_width = gate(c), w.k.shape[1], w.k.shape[3]
    heads, value_width = max(w.v.shape[2], w.k.shape[2]), w.v.shape[3]
    entry = launch.entry("fused_chunk", w.q, key_width, value_width)
    value_block = launch.block(entry["BV"], value_width)
    launch.run(
        fused_chunk_kernel,
        c.sequences * heads * triton.cdiv(value_width, value_block),
        w.q, w.k, w.v, decay[0], w.initial, w.o, w.final, c.cu_seqlens, w.read_scale, w.write_scale, time,
        H=heads, HQ=w.q.shape[2], HK=w.k.shape[2], HV=w.v.shape[2], K=key_width, V=value_width,
        BT=min(c.chunk_size, entry["BT"]), BK=launch.block(entry["key_width"], key_width), BV=value_block,
        DECAY=decay[1], PRECISION=launch.precision(entry), REVERSE=w.reverse, TRANSPOSED=w.transposed,
        **launch.options(entry),
    )


def forward(c: Call):
    """o [B, T, H, V] in v's dtype, and the final state in float32 or None."""
    checks.eager(c)
    refuse_float64(c.q)
    if c.reverse:
        return Outputs(*forward(c.turned())).turned(packed=c.cu_seqlens is not None)
    if not launch.covers("fused_chunk", c.q, c.q.shape[3]):
        return chunk.forward(c)
    c = contiguous(c)
    final = final_state(c)
    o = torch.empty(c.v.shape, dtype=c.v.dtype, device=c.v.device)
    walk(c, Walk(c.q, c.k, c.v, c.initial_state, o, final, c.state_v_first, read_scale=c.factor))
    return o, final


def backward(c: Call, d: Outputs, need: Need):
    """The gradients that are needed, each in its input's dtype."""
    if c.reverse:
        packed = c.cu_seqlens is not None
        return turned_gradients(backward(c.turned(), d.turned(packed), need), packed)
    if need.g or need.g_gamma or not launch.covers("fused_chunk", c.q, max(c.q.shape[3], c.v.shape[3])):
        return chunk.backward(c, d, need)
    c, d = contiguous(c), contiguous(d)
    q, k, v, do, initial = c.q, c.k, c.v, d.o, c.initial_state
    heads, turned = v.shape[2], not c.state_v_first
    dq, dk = (per_value_head(q, heads) if wanted else None for wanted in (need.q, need.k))
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device) if need.v else None
    dstate = torch.empty(initial.shape, dtype=initial.dtype, device=v.device) if need.initial_state else None
    if need.q:
        walk(c, Walk(do, v, k, initial, dq, transposed=turned, read_scale=c.factor))
    past = {"initial": d.final_state, "write_scale": c.factor, "reverse": True}
    if need.v or need.initial_state:
        walk(c, Walk(k, q, do, o=dv, final=dstate, transposed=c.state_v_first, **past))
    if need.k:
        walk(c, Walk(v, do, q, o=dk, transposed=turned, **past))
    return (
        group_sum(dq, q) if need.q else None,
        group_sum(dk, k) if need.k else None,
        dv,
        None,
        None,
        dstate,
    )
