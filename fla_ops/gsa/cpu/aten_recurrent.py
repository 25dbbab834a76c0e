"""gsa on a CPU, step by step: the recurrent form, and the in-place decode step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import pools
from fla_ops.common.cpu.chunks import runs

from .. import checks
from . import abc
from .chunked import compute_dtype, scale_of


@dataclass(frozen=True)
class Steps:
    """Some steps of one call, time first: [T, n * H, width], for the queries [T, n * H, G, width]."""

    order: range  # in which the recurrence runs
    q: Tensor  # scaled
    k: Tensor
    v: Tensor
    s: Tensor
    decay: Tensor

    def fade(self, t: int, state_k: Tensor, state_v: Tensor) -> None:
        """Both states decay on entering step t, in place."""
        state_k.mul_(self.decay[t].unsqueeze(1))
        state_v.mul_(self.decay[t].unsqueeze(2))

    def write(self, t: int, state_k: Tensor, state_v: Tensor) -> None:
        """Both states take in step t, in place."""
        state_k.addcmul_(self.k[t].unsqueeze(2), self.s[t].unsqueeze(1))
        state_v.addcmul_(self.s[t].unsqueeze(2), self.v[t].unsqueeze(1))


def forward(q, k, v, s, g, scale, initial_k, initial_v, output_final_state, reverse, cu_seqlens, cu_seqlens_cpu):
    """Both states, updated in place at every step."""
    checks.launch(q, k, v, s, g, initial_k, initial_v, cu_seqlens, cu_seqlens_cpu)
    s, g = abc.gates(s, g, cu_seqlens, reverse)
    o = v.new_empty((*q.shape[:3], v.shape[3]))
    finals = []
    for sequence, start, end in runs(q, cu_seqlens):
        c = _steps(q, k, v, s, g, scale, reverse, start, end)
        states = _states(initial_k, initial_v, sequence, q, v, s)
        outputs = c.v.new_empty((*c.q.shape[:3], v.shape[3]))
        for t in c.order:
            c.fade(t, *states)
            c.write(t, *states)
            torch.bmm((c.q[t] @ states[0]).softmax(-1), states[1], out=outputs[t])
        o[:, start:end] = _leave(outputs.flatten(1, 2), o)
        finals.append(states)
    return o, *(_joined(finals, v.shape[2]) if output_final_state else (None, None))


def backward(q, k, v, s, g, initial_k, initial_v, cu_seqlens, do, dfinal_k, dfinal_v, scale, reverse, output_mask):
    """The states run again with time for what is read, their gradients run against it for what is written."""
    weights, gates = abc.gates(s, g, cu_seqlens, reverse)
    inputs, wanted = (q, k, v, weights, gates), checks.mask(g, output_mask)
    grads = [x.new_empty(x.shape) if want else None for x, want in zip(inputs, wanted, strict=False)]
    dinitials = []
    for sequence, start, end in runs(q, cu_seqlens):
        c = _steps(*inputs, scale, reverse, start, end)
        upstream = _queries_first(do[:, start:end], c.v.dtype, v.shape[2])
        states = _states(initial_k, initial_v, sequence, q, v, s)
        dstates = _states(dfinal_k, dfinal_v, sequence, q, v, s)
        dq, p, dx, reads = _read_gradients(c, upstream, states, dstates)
        dk, dv, ds, later = _write_gradients(c, upstream, p, dx, dstates)
        dq *= scale_of(q, scale)
        along = reads - c.s * later
        dg = along.cumsum(0) if reverse else along.flip(0).cumsum(0).flip(0)
        dg.masked_fill_(c.decay == 0, 0)
        for whole, part in zip(grads, (dq.flatten(1, 2), dk, dv, ds, dg), strict=True):
            if whole is not None:
                whole[:, start:end] = _leave(part, whole)
        dinitials.append(dstates)
    dq, dk, dv, ds, dg = grads
    if g is None:
        ds, dg = abc.gradient(s, weights, gates, cu_seqlens, ds, dg, reverse), None
    states = zip(_joined(dinitials, v.shape[2]), (initial_k, initial_v), output_mask[5:], strict=True)
    return dq, dk, dv, ds, dg, *(x.to(initial.dtype) if want else None for x, initial, want in states)


def _read_gradients(
    c: Steps, upstream: Tensor, states: tuple[Tensor, Tensor], dfinals: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq (without the scale), p, dx, and what each step reads from earlier ones; moves the states to the end.

    The last step reads for the final states too.
    """
    dq, p = torch.empty_like(c.q), c.q.new_empty((*c.q.shape[:3], c.s.shape[2]))
    dx, reads = torch.empty_like(p), torch.zeros_like(c.s)
    for t in c.order:
        c.fade(t, *states)
        if t == c.order[-1]:
            reads[t] = (states[0] * dfinals[0]).sum(1) + (states[1] * dfinals[1]).sum(2)
        earlier, dearlier = c.q[t] @ states[0], upstream[t] @ states[1].mT
        c.write(t, *states)
        torch.softmax(c.q[t] @ states[0], -1, out=p[t])
        pdp = p[t] * (upstream[t] @ states[1].mT)
        torch.sub(pdp, p[t] * pdp.sum(-1, keepdim=True), out=dx[t])
        torch.bmm(dx[t], states[0].mT, out=dq[t])
        reads[t] += (p[t] * dearlier).addcmul_(earlier, dx[t]).sum(1)
    return dq, p, dx, reads


def _write_gradients(
    c: Steps, upstream: Tensor, p: Tensor, dx: Tensor, dstates: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dk, dv, ds, and the part of ds from the reads of later steps; moves the states' gradients to the start."""
    dk, dv, ds, later = (torch.empty_like(x) for x in (c.k, c.v, c.s, c.s))
    for t in reversed(c.order):
        if t == c.order[-1]:
            later[t] = 0
        else:
            _slot_gradient(c, t, dstates, later[t])
        dstates[0].baddbmm_(c.q[t].mT, dx[t])
        dstates[1].baddbmm_(p[t].mT, upstream[t])
        torch.bmm(dstates[0], c.s[t].unsqueeze(2), out=dk[t].unsqueeze(2))
        torch.bmm(c.s[t].unsqueeze(1), dstates[1], out=dv[t].unsqueeze(1))
        _slot_gradient(c, t, dstates, ds[t])
        c.fade(t, *dstates)
    return dk, dv, ds, later


def _slot_gradient(c: Steps, t: int, dstates: tuple[Tensor, Tensor], out: Tensor) -> None:
    torch.bmm(c.k[t].unsqueeze(1), dstates[0], out=out.unsqueeze(1))
    out.unsqueeze(2).baddbmm_(dstates[1], c.v[t].unsqueeze(2))


def step(q, k, v, s, g, state_k, state_v, scale, slots):
    """One step for N sequences, rows of both pools updated in place, block by block while these are in the cache."""
    checks.launch_step(q, k, v, s, g, state_k, state_v, slots)
    sequences, heads, value_width = v.shape
    rows = list(range(sequences)) if slots is None else valid.slot_values(slots, len(state_k))
    dtype = compute_dtype(v)
    queries = q.to(dtype).unflatten(1, (heads, -1)) * scale_of(q, scale)
    keys, values, weights = (x.to(dtype) for x in (k, v, s))
    decay = g.to(dtype).exp()
    o = values.new_zeros((*queries.shape[:3], value_width))
    for some, at in pools.blocks(rows, heads * s.shape[2] * (q.shape[2] + value_width)):
        held_k, held_v = state_k[at], state_v[at]
        current_k, current_v = held_k.to(dtype), held_v.to(dtype)
        current_k.mul_(decay[some].unsqueeze(-2)).addcmul_(keys[some].unsqueeze(-1), weights[some].unsqueeze(-2))
        current_v.mul_(decay[some].unsqueeze(-1)).addcmul_(weights[some].unsqueeze(-1), values[some].unsqueeze(-2))
        o[some] = torch.matmul(torch.matmul(queries[some], current_k).softmax(-1), current_v)
        pools.update(state_k, at, held_k, current_k)
        pools.update(state_v, at, held_v, current_v)
    return o.flatten(1, 2).to(v.dtype)


def _time_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, T, heads, D] to [T, n * heads, D]."""
    return x.transpose(0, 1).to(dtype).flatten(1, 2).contiguous()


def _queries_first(x: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    """[n, T, H * G, D] to [T, n * H, G, D]."""
    return x.transpose(0, 1).to(dtype).unflatten(2, (heads, -1)).flatten(1, 2).contiguous()


def _steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    scale: float | None,
    reverse: bool,
    start: int,
    end: int,
) -> Steps:
    """The steps from start to end."""
    dtype, time = compute_dtype(v), end - start
    q, k, v, s, g = (x[:, start:end] for x in (q, k, v, s, g))
    return Steps(
        range(time - 1, -1, -1) if reverse else range(time),
        _queries_first(q, dtype, v.shape[2]) * scale_of(q, scale),
        *(_time_first(x, dtype) for x in (k, v, s)),
        _time_first(g, dtype).exp(),
    )


def _states(
    state_k: Tensor | None, state_v: Tensor | None, sequence: slice, q: Tensor, v: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Fresh [n * H, K, M] and [n * H, M, V] in the carried dtype; zeros where there is none."""
    dtype, heads = compute_dtype(v), v.shape[2]
    count, key, value, slots = sequence.stop - sequence.start, q.shape[3], v.shape[3], s.shape[3]
    fresh = []
    for state, widths in ((state_k, (key, slots)), (state_v, (slots, value))):
        if state is None:
            fresh.append(v.new_zeros((count * heads, *widths), dtype=dtype))
        else:
            rows = state[sequence].flatten(0, 1)
            fresh.append(rows.to(dtype, copy=True, memory_format=torch.contiguous_format))
    return fresh[0], fresh[1]


def _joined(states: list[tuple[Tensor, Tensor]], heads: int) -> tuple[Tensor, Tensor]:
    """The states of all sequences, [N, H, K, M] and [N, H, M, V]."""
    first, second = (torch.cat([pair[i] for pair in states]).unflatten(0, (-1, heads)) for i in (0, 1))
    return first, second


def _leave(steps: Tensor, like: Tensor) -> Tensor:
    """[T, n * heads, D] to [n, T, heads, D] as in `like`."""
    return steps.unflatten(1, (like.shape[0], like.shape[2])).transpose(0, 1)
