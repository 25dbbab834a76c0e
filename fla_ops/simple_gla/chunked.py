"""The chunkwise form of simple_gla as ATen calls, over any chunk layout; forward and backward.

Inside a chunk of C steps the quadratic form is a masked C x C product; across chunks a state of [K, V] is carried:

    o_i = sum_{j <= i} D_ij (q_i . k_j) v_j + a_i S^T q_i        (q already scaled)
    S'  = d S + sum_j b_j k_j v_j^T

D_ij is the decay from step j to step i, a_i from the chunk's start to i, b_j from j to the chunk's end, d over the chunk.
Tensors are [rows, lanes, HK, G, C, width]: G value heads share each query/key head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_ops.common import decay as decays
from fla_ops.common.decay import Decay

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32: half-precision inputs are converted once, while they are cut into chunks."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def forward(
    layout: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    state_v_first: bool,
) -> tuple[Tensor, Tensor | None]:
    """o [B, T, H, V] in v's dtype, and the final state in the carried dtype."""
    queries, keys, values, decay = _cut(layout, q, k, v, g, g_gamma, scale)
    state = enter_state(initial_state, k.shape[2], state_v_first, values.dtype)
    states, final = layout.scan(_write(keys, values, decay), None if decay is None else decay.total, state)
    o = _scores(queries, keys, decay) @ values
    o += _scaled(queries, None if decay is None else decay.from_start) @ states
    return layout.join(o.flatten(2, 3), v.dtype), leave_state(final, state_v_first) if output_final_state else None


def backward(
    layout: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    initial_state: Tensor | None,
    do: Tensor,
    dfinal_state: Tensor | None,
    scale: float | None,
    state_v_first: bool,
    output_mask: list[bool],
) -> Gradients:
    """The gradients that output_mask asks for, each in its input's dtype; states are recomputed, not saved."""
    need_q, need_k, need_v, need_g, need_gamma, need_state = output_mask
    need_gate = need_g or need_gamma
    queries, keys, values, decay = _cut(layout, q, k, v, g, g_gamma, scale)
    do = layout.split(do, values.dtype).unflatten(2, (k.shape[2], -1))
    a, b, total = (None, None, None) if decay is None else (decay.from_start, decay.to_end, decay.total)
    states = dstates = dq = dk = dk_across = dv = dg = dgamma = dstate = None

    if need_q or need_gate:
        state = enter_state(initial_state, k.shape[2], state_v_first, values.dtype)
        states, _ = layout.scan(_write(keys, values, decay), total, state)
    if need_k or need_v or need_gate or need_state:
        dfinal = enter_state(dfinal_state, k.shape[2], state_v_first, values.dtype)
        dstates, dstate = layout.scan(_scaled(queries, a).mT @ do, total, dfinal, reverse=True)
    if need_q or need_k or need_gate:
        dscores = _scores(do, values, decay)
        if states is not None:
            dq = _scaled_(do @ states.mT, a) + dscores @ keys
        if dstates is not None and (need_k or need_gate):
            dk_across = _scaled_(values @ dstates.mT, b)
            dk = dk_across + dscores.mT @ queries
    if need_v:
        dv = _scores(queries, keys, decay).mT @ do
        dv += _scaled(keys, b) @ dstates
        dv = layout.join(dv.flatten(2, 3), v.dtype)
    if need_gate:
        dg = _gate_gradient(queries, keys, dq, dk, dk_across, states, dstates, decay)
        dg = layout.join(dg.flatten(2, 3)[..., None], dg.dtype if need_gamma else g.dtype).squeeze(-1)
        if need_gamma:
            dg, dgamma = None, dg.sum((0, 1)).to(g_gamma.dtype)
    if need_q:
        dq = layout.join(dq.sum(3).mul_(scale_of(q, scale)), q.dtype)
    if need_k:
        dk = layout.join(dk.sum(3), k.dtype)
    if need_state:
        dstate = leave_state(dstate, state_v_first).to(initial_state.dtype)
    return (
        dq if need_q else None,
        dk if need_k else None,
        dv,
        dg,
        dgamma,
        dstate if need_state else None,
    )


def final_state(
    layout: Any, k: Tensor, v: Tensor, g: Tensor | None, g_gamma: Tensor | None, initial_state: Tensor | None
) -> Tensor:
    """The state [N, H, K, V] after the layout's steps, without the outputs."""
    _, keys, values, decay = _cut(layout, None, k, v, g, g_gamma, None)
    state = enter_state(initial_state, k.shape[2], False, values.dtype)
    _, final = layout.scan(_write(keys, values, decay), None if decay is None else decay.total, state)
    return leave_state(final, False)


def scale_of(q: Tensor, scale: float | None) -> float:
    """K ** -0.5 unless given."""
    return float(q.shape[3] ** -0.5 if scale is None else scale)


def enter_state(state: Tensor | None, key_heads: int, state_v_first: bool, dtype: torch.dtype) -> Tensor | None:
    """[N, H, K, V] (or [N, H, V, K]) to [N, HK, G, K, V] in `dtype`."""
    if state is None:
        return None
    return (state.mT if state_v_first else state).to(dtype).unflatten(1, (key_heads, -1))


def leave_state(state: Tensor, state_v_first: bool) -> Tensor:
    """The inverse of enter_state, contiguous."""
    state = state.flatten(1, 2)
    return (state.mT if state_v_first else state).contiguous()


def _cut(
    layout: Any, q: Tensor | None, k: Tensor, v: Tensor, g: Tensor | None, g_gamma: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Decay | None]:
    """Queries (scaled; the keys again where there are none), keys and values in chunks, and the decay factors."""
    dtype, key_heads = compute_dtype(v), k.shape[2]
    keys = layout.split(k, dtype).unsqueeze(3)
    queries = keys if q is None else layout.split(q, dtype).mul_(scale_of(q, scale)).unsqueeze(3)
    values = layout.split(v, dtype).unflatten(2, (key_heads, -1))
    decay = None
    if g is not None:
        steps = layout.split(g[..., None], dtype).squeeze(-1).unflatten(2, (key_heads, -1))
        decay = decays.per_step(steps)
    elif g_gamma is not None:
        decay = decays.constant(g_gamma.to(dtype).unflatten(0, (key_heads, -1)), layout.size, layout.lengths(v.device))
    return queries, keys, values, decay


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _scaled_(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x.mul_(factor)


def _write(keys: Tensor, values: Tensor, decay: Decay | None) -> Tensor:
    """What each chunk adds to the state: sum_j b_j k_j v_j^T."""
    return _scaled(keys, None if decay is None else decay.to_end).mT @ values


def _scores(rows: Tensor, columns: Tensor, decay: Decay | None) -> Tensor:
    """The causal, decayed products of a chunk: D_ij (rows_i . columns_j)."""
    products = rows @ columns.mT
    if decay is None:
        return products.tril_()
    if decay.within.shape[3] == products.shape[3]:
        return products.mul_(decay.within)
    return products * decay.within


def _gate_gradient(
    queries: Tensor,
    keys: Tensor,
    dq: Tensor,
    dk: Tensor,
    dk_across: Tensor,
    states: Tensor,
    dstates: Tensor,
    decay: Decay,
) -> Tensor:
    """The gradient of g, [rows, lanes, HK, G, C], without leaving the chunk.

    With P the running sum of g in the chunk, dP_i = q_i . dq_i - k_i . dk_i; the chunk's end, through b and d, adds
    sum_j k_j . dk_across_j + d <S, dS'> at the last step. dg is the running sum of dP from the end.
    """
    along = (queries * dq).sum(-1) - (keys * dk).sum(-1)
    along[..., -1] += (keys * dk_across).sum((-1, -2)) + decay.total[..., 0, 0] * (states * dstates).sum((-1, -2))
    return along.flip(-1).cumsum(-1).flip(-1) * decay.alive
