"""simple_gla on a CPU, step by step: the recurrent form, and the in-place decode step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import pools
from fla_ops.common.cpu.chunks import runs

from .. import checks
from .chunked import compute_dtype, scale_of

WINDOW = 256  # steps over which the gates' gradient is a running sum


def forward(
    q, k, v, g, g_gamma, scale, initial_state, output_final_state, reverse, state_v_first, cu_seqlens, cu_seqlens_cpu
):
    """One state, updated in place at every step."""
    checks.launch(q, k, v, g, g_gamma, initial_state, state_v_first, cu_seqlens, cu_seqlens_cpu)
    o, final = torch.empty_like(v, memory_format=torch.contiguous_format), []
    for sequence, start, end in runs(q, cu_seqlens):
        queries, keys, values, decay = _steps(q, k, v, g, g_gamma, scale, start, end)
        state = _state(initial_state, sequence, q, v, state_v_first)
        outputs = torch.empty_like(values)
        for t in _order(end - start, reverse):
            _advance(state, keys[t], values[t], None if decay is None else decay[t])
            torch.bmm(queries[t].unsqueeze(1), state, out=outputs[t].unsqueeze(1))
        o[:, start:end] = _leave(outputs, o, start, end)
        final.append(state.unflatten(0, (-1, v.shape[2])))
    if not output_final_state:
        return o, None
    return o, (torch.cat(final).mT if state_v_first else torch.cat(final)).contiguous()


def backward(
    q, k, v, g, g_gamma, initial_state, cu_seqlens, do, dfinal_state, scale, reverse, state_v_first, output_mask
):
    """S runs again in the direction of time for dq; dS runs against it for dk and dv.

    dg_t = <exp(g_t) S_{t-1}, dS_t>. It is dg_{t+1}, and what step t reads from the state before it, less what the later
    steps read of its own. This sum begins afresh, with the product itself, at the end of every WINDOW steps.
    """
    need_q, need_k, need_v, need_g, need_gamma, need_state = output_mask
    need_gate = need_g or need_gamma
    dtype, heads = compute_dtype(v), v.shape[2]
    inputs, wanted = (q, k, v, g), (need_q, need_k, need_v, need_g)
    grads = [x.new_empty(x.shape) if want else None for x, want in zip(inputs, wanted, strict=True)]
    dgamma = v.new_zeros(heads, dtype=dtype) if need_gamma else None
    dinitial = []
    for sequence, start, end in runs(q, cu_seqlens):
        queries, keys, values, decay = _steps(q, k, v, g, g_gamma, scale, start, end)
        upstream = _time_first(do[:, start:end], dtype, heads)
        own = (values * upstream).sum(-1, keepdim=True)
        order = _order(end - start, reverse)
        ends: dict[int, Any] = dict.fromkeys((*order[WINDOW - 1 :: WINDOW], *order[-1:]))
        dqueries = dkeys = dvalues = None
        if need_q or need_gate:
            dqueries = torch.empty_like(queries)  # of the state before each step
            state = _state(initial_state, sequence, q, v, state_v_first)
            for t in order:
                if need_gate and t in ends:
                    ends[t] = state.clone()
                torch.bmm(state, upstream[t].unsqueeze(2), out=dqueries[t].unsqueeze(2))
                _advance(state, keys[t], values[t], None if decay is None else decay[t])
            if decay is not None:
                dqueries *= decay.squeeze(-1)
            reads = (queries * dqueries).sum(-1)
            dqueries.addcmul_(keys, own)
        dstate = _state(dfinal_state, sequence, q, v, state_v_first)
        if need_k or need_v or need_gate or need_state:
            dkeys, dvalues = torch.empty_like(keys), torch.empty_like(values)
            arriving = None  # the decay of the step after, which dS crosses on its way here
            for t in reversed(order):
                if arriving is not None:
                    dstate.mul_(arriving)
                torch.bmm(dstate, values[t].unsqueeze(2), out=dkeys[t].unsqueeze(2))
                _advance(dstate, queries[t], upstream[t], None)
                torch.bmm(keys[t].unsqueeze(1), dstate, out=dvalues[t].unsqueeze(1))
                arriving = None if decay is None else decay[t]
                if need_gate and t in ends:
                    ends[t] = ends[t].mul_(dstate).sum((1, 2)) * arriving[:, 0, 0]
            if arriving is not None:
                dstate.mul_(arriving)
            writes = (keys * dkeys).sum(-1)
            dkeys.addcmul_(queries, own)
        if need_gate:
            dg = _gate_gradient(reads - writes, ends, reverse)
            dg = torch.where(decay[..., 0, 0] == 0, 0, dg).unflatten(1, (-1, heads)).transpose(0, 1)
            if need_gamma:
                dgamma += dg.sum((0, 1))
            else:
                grads[3][:, start:end] = dg
        if need_q:
            dqueries *= scale_of(q, scale)
        for whole, part in zip(grads[:3], (dqueries, dkeys, dvalues), strict=True):
            if whole is not None:
                whole[:, start:end] = _leave(part, whole, start, end)
        dinitial.append(dstate.unflatten(0, (-1, heads)))
    dinitial_state = None
    if need_state:
        dinitial_state = torch.cat(dinitial)
        dinitial_state = (dinitial_state.mT if state_v_first else dinitial_state).to(initial_state.dtype).contiguous()
    return *grads, dgamma.to(g_gamma.dtype) if need_gamma else None, dinitial_state


def step(q, k, v, state, g, g_gamma, scale, slots):
    """One step for N sequences, state rows updated in place, block by block while these are in the cache."""
    checks.launch_step(q, k, v, state, g, g_gamma, slots)
    sequences, heads, width = v.shape
    rows = list(range(sequences)) if slots is None else valid.slot_values(slots, len(state))
    dtype, groups = compute_dtype(v), heads // k.shape[1]
    queries, keys = (x.to(dtype).repeat_interleave(groups, 1) if groups > 1 else x.to(dtype) for x in (q, k))
    queries, keys, values = (queries * _step_scale(q, scale)).unsqueeze(2), keys.unsqueeze(3), v.to(dtype).unsqueeze(2)
    decay = None
    if g is not None:
        decay = g.to(dtype).exp()[..., None, None]
    elif g_gamma is not None:
        decay = g_gamma.to(dtype).exp()[:, None, None].expand(sequences, heads, 1, 1)
    o = (values.new_empty if slots is None else values.new_zeros)(values.shape)
    for some, at in pools.blocks(rows, heads * q.shape[2] * width):
        held = state[at]
        current = held.to(dtype).flatten(0, 1)
        if decay is not None:
            current.mul_(decay[some].flatten(0, 1))
        current.baddbmm_(keys[some].flatten(0, 1), values[some].flatten(0, 1))
        o[some] = torch.bmm(queries[some].flatten(0, 1), current).unflatten(0, (-1, heads))
        pools.update(state, at, held, current)
    return o.squeeze(2).to(v.dtype)


def _step_scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[2] ** -0.5 if scale is None else scale)


def _order(time: int, reverse: bool) -> range:
    return range(time - 1, -1, -1) if reverse else range(time)


def _advance(state: Tensor, key: Tensor, value: Tensor, decay: Tensor | None) -> None:
    """S <- decay S + k v^T, in place."""
    if decay is not None:
        state.mul_(decay)
    state.addcmul_(key.unsqueeze(2), value.unsqueeze(1))


def _gate_gradient(change: Tensor, ends: dict[int, Tensor], reverse: bool) -> Tensor:
    """dg [T, B * H] from what it is at the ends of windows, and from how much it changes to each other step."""
    for t, product in ends.items():
        change[t] = product
    windows = (change.flip(0) if reverse else change).split(WINDOW)
    dg = torch.cat([window.flip(0).cumsum(0).flip(0) for window in windows]) if ends else change
    return dg.flip(0) if reverse else dg


def _time_first(x: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    """[B, T, HK, D] to [T, B * H, D], each head repeated for its group."""
    x = x.transpose(0, 1).to(dtype)
    groups = heads // x.shape[2]
    x = x.repeat_interleave(groups, 2) if groups > 1 else x
    return x.flatten(1, 2).contiguous()


def _steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    scale: float | None,
    start: int,
    end: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Scaled queries, keys and values [T, B * H, D] and decay factors [T, B * H, 1, 1] of the steps from start to
    end.
    """
    dtype, heads = compute_dtype(v), v.shape[2]
    queries, keys, values = (_time_first(x[:, start:end], dtype, heads) for x in (q, k, v))
    decay = None
    if g is not None:
        decay = g[:, start:end].transpose(0, 1).to(dtype).flatten(1).exp()[..., None, None]
    elif g_gamma is not None:
        decay = g_gamma.to(dtype).exp().repeat(len(q)).expand(end - start, -1)[..., None, None]
    return queries * scale_of(q, scale), keys, values, decay


def _state(state: Tensor | None, sequence: slice, q: Tensor, v: Tensor, state_v_first: bool) -> Tensor:
    """A fresh [n * H, K, V] in the carried dtype."""
    dtype = compute_dtype(v)
    if state is None:
        return v.new_zeros(((sequence.stop - sequence.start) * v.shape[2], q.shape[3], v.shape[3]), dtype=dtype)
    state = state[sequence].flatten(0, 1)
    return (state.mT if state_v_first else state).to(dtype, copy=True, memory_format=torch.contiguous_format)


def _leave(steps: Tensor, like: Tensor, start: int, end: int) -> Tensor:
    """[T, B * H, D] to the steps of `like` [B, T, heads, D]: groups are summed where `like` has fewer heads."""
    batch, _, heads, _ = like.shape
    group = max(1, steps.shape[1] // max(1, batch * heads))
    return steps.unflatten(1, (batch, heads, group)).sum(3).transpose(0, 1)
