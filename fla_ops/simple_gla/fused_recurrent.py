"""The recurrent form: one program steps through a sequence and holds the whole [K, BV] state. All arithmetic is float32.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t

With reverse=True time runs backwards. The gradients of q, k and v are the same walk with the roles exchanged: dq is the walk of (do, v, k) in
the same direction; dv is that of (k, q, do) and dk that of (v, do, q) in the other, with the gradient of the state as the state. That
one decays on leaving a step, not on entering it: dS_t = exp(g_{t+1}) dS_{t+1} + scale q_t do_t^T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.chunk_index import sequence_bounds
from fla_ops.common.gate_gradient import gate_gradient
from fla_ops.common.gates import gate
from fla_ops.common.heads import group_sum, per_value_head
from fla_ops.common.tiles import split_program, state_tile

from . import checks
from .launching import WIDEST, check_offsets, contiguous, final_state, refuse_float64, refuse_width, scale_of


@triton.jit(do_not_specialize=["T"])
def fused_recurrent_kernel(
    q, k, v, g,                             # [B, T, HQ, K], [B, T, HK, K], [B, T, HV, V], [B, T, H] or [H]
    initial, o, final,                      # [N, H, K, V], [B, T, H, V], [N, H, K, V]; TRANSPOSED: the states are [N, H, V, K]
    cu_seqlens,                             # [N + 1]
    read_scale, write_scale, T,             # on what is read from the state, and on what is written to it
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DECAY_LAST: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
):
    n, head, block = split_program((V + BV - 1) // BV, H)
    start, length = sequence_bounds(n, cu_seqlens, T)
    key, value = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_key, in_value = key < K, value < V
    q += head // (H // HQ) * K + key
    k += head // (H // HK) * K + key
    v += head // (H // HV) * V + value

    state = tl.zeros([BK, BV], tl.float32)
    at, inside = state_tile(n * H + head, 0, block * BV, K, V, BK, BV, TRANSPOSED)
    if initial is not None:
        state += tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    decay = 1.0
    if DECAY == "head":
        decay = tl.exp(tl.load(g + head).to(tl.float32))
    for i in range(length):
        t = start + (length - 1 - i if REVERSE else i)
        if DECAY == "step":
            decay = tl.exp(tl.load(g + t * H + head).to(tl.float32))
        keys = tl.load(k + t * (HK * K), mask=in_key, other=0.0).to(tl.float32) * write_scale
        values = tl.load(v + t * (HV * V), mask=in_value, other=0.0).to(tl.float32)
        if not DECAY_LAST:
            state *= decay
        state += keys[:, None] * values[None, :]
        if o is not None:
            queries = tl.load(q + t * (HQ * K), mask=in_key, other=0.0).to(tl.float32) * read_scale
            out = tl.sum(state * queries[:, None], 0)
            tl.store(o + (t * H + head) * V + value, out.to(o.dtype.element_ty), mask=in_value)
        if DECAY_LAST:
            state *= decay
    if final is not None:
        tl.store(final + at, state.to(final.dtype.element_ty), mask=inside)


def walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: tuple[Tensor | None, str],
    cu_seqlens: Tensor | None,
    reverse: bool,
    initial: Tensor | None = None,
    o: Tensor | None = None,
    final: Tensor | None = None,
    transposed: bool = False,
    read_scale: float = 1.0,
    write_scale: float = 1.0,
    decay_last: bool = False,
) -> None:
    """Fill o [B, T, H, V] and final, where given, from q, k, v in their roles; `transposed` states are stored as [N, H, V, K]."""
    batch, time, _, key_width = k.shape
    value_width = v.shape[3]
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    entry = launch.entry("fused_recurrent", q, key_width, value_width)
    value_block = min(entry["BV"], triton.next_power_of_2(value_width))
    launch.run(
        fused_recurrent_kernel,
        (batch if cu_seqlens is None else cu_seqlens.shape[0] - 1) * heads * triton.cdiv(value_width, value_block),
        q, k, v, decay[0], initial, o, final, cu_seqlens, read_scale, write_scale, time,
        H=heads, HQ=q.shape[2], HK=k.shape[2], HV=v.shape[2], K=key_width, V=value_width,
        BK=launch.block(WIDEST, key_width), BV=value_block,
        DECAY=decay[1], DECAY_LAST=decay_last, REVERSE=reverse, TRANSPOSED=transposed, **launch.options(entry),
    )


def forward(
    q, k, v, g, g_gamma, scale, initial_state, output_final_state, reverse, state_v_first, cu_seqlens, cu_seqlens_cpu
):
    """o [B, T, H, V] in v's dtype, and the final state in float32 or None."""
    checks.launch(q, k, v, g, g_gamma, initial_state, state_v_first, cu_seqlens, cu_seqlens_cpu)
    refuse_float64(q)
    refuse_width("K", q.shape[3])
    check_offsets(cu_seqlens, q.shape[1])
    q, k, v, initial_state, cu_seqlens = contiguous(q, k, v, initial_state, cu_seqlens)
    final = final_state(q, v, cu_seqlens, state_v_first) if output_final_state else None
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    walk(
        q, k, v, gate(g, g_gamma), cu_seqlens, reverse,
        initial=initial_state, o=o, final=final, transposed=state_v_first, read_scale=scale_of(q, scale),
    )
    return o, final


def backward(
    q, k, v, g, g_gamma, initial_state, cu_seqlens, do, dfinal_state, scale, reverse, state_v_first, output_mask
):
    """The gradients that output_mask asks for (q, k, v, g, g_gamma, initial_state), each in its input's dtype."""
    need_q, need_k, need_v, need_g, need_gamma, need_state = output_mask
    need_gate = need_g or need_gamma
    refuse_width("V", v.shape[3])
    q, k, v, do, initial_state, dfinal_state, cu_seqlens = contiguous(
        q, k, v, do, initial_state, dfinal_state, cu_seqlens
    )
    heads, scale, decay = v.shape[2], scale_of(q, scale), gate(g, g_gamma)
    dq = dk = final = dg = None
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device) if need_v else None
    dstate = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=v.device) if need_state else None
    if need_q or need_gate:
        dq = per_value_head(q, heads, exact=need_gate)
        if need_gate and dfinal_state is not None:
            final = torch.empty(dfinal_state.shape, dtype=torch.float32, device=v.device)
        walk(
            do, v, k, decay, cu_seqlens, reverse,
            initial=initial_state, o=dq, final=final, transposed=not state_v_first, read_scale=scale,
        )
    past = {"initial": dfinal_state, "write_scale": scale, "decay_last": True}
    if need_v or need_state:
        walk(k, q, do, decay, cu_seqlens, not reverse, o=dv, final=dstate, transposed=state_v_first, **past)
    if need_k or need_gate:
        dk = per_value_head(q, heads, exact=need_gate)
        walk(v, do, q, decay, cu_seqlens, not reverse, o=dk, transposed=not state_v_first, **past)
    if need_gate:
        dtype = g.dtype if need_g else torch.float32
        dg = gate_gradient(q, k, dq, dk, decay, final, dfinal_state, cu_seqlens, reverse, dtype)
    return (
        group_sum(dq, q) if need_q else None,
        group_sum(dk, k) if need_k else None,
        dv,
        dg if need_g else None,
        dg.sum((0, 1)).to(g_gamma.dtype) if need_gamma else None,
        dstate,
    )
