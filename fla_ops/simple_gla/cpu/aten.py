"""simple_gla as ATen calls: for float64, for machines without a C++ compiler, and for what `inlining()` compiles.

With C steps in a chunk, P the running sum of g in it, S the state that enters it, and q already scaled:

    o_i = sum_{j <= i} D_ij (q_i . k_j) v_j + a_i S^T q_i        D_ij = exp(P_i - P_j), a_i = exp(P_i)
    S'  = a_C S + sum_j b_j k_j v_j^T                            b_j = exp(P_C - P_j)

The chunk forms and the recurrent form are this, from any state to any state. The quadratic form is one chunk of T
steps, whose weighted scores D_ij (q_i . k_j) are `attn`; where nobody asks for those, smaller chunks give the same o in
less memory. A step is the recurrence once. Nothing is updated in place but the pool of a step.

Tensors are [lanes, HK, G, rows, C, width], with G the value heads of a query and key head; layouts.py has them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fla_ops.common.cpu import slots
from fla_ops.common.cpu.layouts import FORGET, Dense, Packed, layout_of, owners, running, weights, whole
from fla_ops.common.cpu.sequences import for_rows, is_traced, one_by_one
from fla_ops.validation import cu_seqlens_values_async, state_dtype, step_counts

from .. import checks
from ..call import Advance, Call, Gradients, Need, Outputs, Prefill, Record, Recorded, Step, Weighted, WeightsNeed
from ..stopping import stopped

CHUNK = 64  # steps in a chunk, at most: longer ones only cost more products


def forward(c: Call) -> Outputs:
    """o [B, T, H, V], and the final state in the dtype that it is carried in."""

    def body(c: Call) -> Outputs:
        x = _cut(c, min(c.chunk_size, CHUNK))
        states, final = _states(c, x)
        o = _read_out(c, x, states)
        return Outputs(o, _leave(c, final) if c.output_final_state else None)

    return Outputs(*one_by_one(body, c, Outputs._fields))


def parallel_forward(c: Call) -> Weighted:
    """o, and attn [B, H, T, T] where it is asked for."""
    checks.inputs(c)

    def body(c: Call) -> Weighted:
        x = _cut_whole(c) if c.output_attentions else _cut(c, CHUNK)
        o = _read_out(c, x, _states(c, x)[0])
        time = c.q.shape[1]
        return Weighted(o, x.scores[..., 0, :time, :time].flatten(1, 2).to(o.dtype) if c.output_attentions else None)

    return Weighted(*one_by_one(body, c, Weighted._fields))


def backward(c: Call, d: Outputs, need: Need) -> Gradients:
    """The gradients that are needed; scores and states are computed again."""

    def body(c: Call, d: Outputs, need: Need) -> Gradients:
        return _gradients(c, _cut(c, min(c.chunk_size, CHUNK)), d.o, need, d.final_state)

    return _finish(c, one_by_one(body, c, Need._fields, d, need))


def parallel_backward(c: Call, d: Weighted, need: WeightsNeed) -> Gradients:
    """The same for the quadratic form."""

    def body(c: Call, d: Weighted, need: WeightsNeed) -> Gradients:
        x = _cut(c, CHUNK) if d.attn is None else _cut_whole(c)
        return _gradients(c, x, d.o, Need(*need, initial_state=False), dattn=d.attn)[:-1]

    return _finish(c, one_by_one(body, c, WeightsNeed._fields, d, need))


def step(c: Step) -> Tensor:
    """o [N, H, V] of one step, and its rows of the pool updated in place."""
    dtype, groups = state_dtype(c.v), (c.q.shape[1], -1)
    held = slots.read(c.pool, c.slots)
    state, value = (x.to(dtype).unflatten(1, groups) for x in (held, c.v[:, :, None]))  # [N, HK, G, K or 1, V]
    query, key = (x.to(dtype)[:, :, None, :, None] for x in (c.q, c.k))
    if c.g is not None or c.g_gamma is not None:
        log_decay = c.g if c.g is not None else c.g_gamma.expand(c.v.shape[:2])
        state = state * log_decay.to(dtype).exp().unflatten(1, groups)[..., None, None]
    state = state + key * value
    o = (query * c.factor * state).sum(-2).flatten(1, 2).to(c.v.dtype)
    slots.write_(c.pool, c.slots, held, state.flatten(1, 2))
    return slots.only_with_slots(o, c.slots)


def record(c: Record) -> Recorded:
    """o where there are queries, the states on the way, and the final ones."""
    checks.record(c)
    if c.at is not None:
        return stopped(c, record)

    def body(one: Call) -> Recorded:
        x = _cut(one, min(c.chunk_size, CHUNK))
        states, final = _states(one, x)
        o = None if c.q is None else _read_out(one, x, states)
        return Recorded(o, _leave(one, x.layout.every(c.every, states, final)), _leave(one, final))

    o, states, final = one_by_one(body, c.call(), Recorded._fields)
    return Recorded(o, pad(states, (0, 0, 0, 0, 0, 0, 0, c.rows - states.shape[0])), final)


def advance(c: Advance) -> None:
    """The first `accepted` steps of each sequence, into its row of the pool: the others have no key, value or decay."""
    time = c.k.shape[1]
    if is_traced(c.k):
        torch._assert_async(((c.accepted >= 0) & (c.accepted <= time)).all(), "accepted must be in [0, T]")
    else:
        step_counts(c.accepted, time)
    held = slots.read(c.pool, c.slots)
    taken = (torch.arange(time, device=c.k.device) < c.accepted[:, None])[..., None]  # [N, T, 1]
    k, v = (torch.where(taken[..., None], x, 0) for x in (c.k, c.v))
    g = c.g if c.g_gamma is None else c.g_gamma.expand(c.v.shape[:3])
    g = None if g is None else torch.where(taken, g, 0)
    final = forward(Call(k, k, v, g, initial_state=held, output_final_state=True)).final_state
    slots.write_(c.pool, c.slots, held, torch.where(for_rows(c.accepted > 0, final), final, held.to(final.dtype)))


def prefill(c: Prefill) -> Tensor:
    """o of every sequence from its row of the pool, which then holds its final state."""
    held = slots.read(c.pool, c.slots)
    initial = held if c.fresh is None else torch.where(for_rows(c.fresh, held), 0, held)
    o, final = forward(c.call(initial))
    slots.write_(c.pool, c.slots, held, final)
    if c.slots is None:
        return o
    if c.cu_seqlens is None:
        return slots.only_with_slots(o, c.slots)
    owner = owners(c.cu_seqlens[1:].long(), o.shape[1]).clamp(max=c.slots.shape[0] - 1)
    return slots.only_with_slots(o[0], c.slots[owner])[None]


class Chunks(NamedTuple):
    """One call in chunks."""

    layout: Dense | Packed
    q: Tensor  # scaled
    k: Tensor
    v: Tensor
    within: Tensor  # D, [..., C, C]
    from_start: Tensor  # a, [..., C, 1]
    to_end: Tensor  # b, [..., C, 1]
    log_total: Tensor  # P_C, [...]

    @property
    def scores(self) -> Tensor:
        """D_ij (q_i . k_j)"""
        return self.q @ self.k.mT * self.within

    @property
    def updates(self) -> Tensor:
        """What each chunk adds to the state. A decay that is no number is left to log_total, which reaches no earlier
        chunk.
        """
        return (self.k * self.to_end.nan_to_num(0.0, 0.0)).mT @ self.v


def _cut(c: Call, size: int) -> Chunks:
    return _chunks(c, layout_of(c, size), _log_decay(c))


def _cut_whole(c: Call) -> Chunks:
    """One chunk of T steps. A pack without states is one sequence that forgets where each of its own begins."""
    log_decay = _log_decay(c)
    if c.cu_seqlens is not None:
        cu_seqlens_values_async(c.cu_seqlens, c.q.shape[1])
        begins = (torch.arange(c.q.shape[1], device=c.q.device)[:, None] == c.cu_seqlens).any(1)
        log_decay = torch.where(begins[:, None], FORGET, log_decay)
    return _chunks(c, Dense(*c.q.shape[:2]), log_decay)


def _log_decay(c: Call) -> Tensor:
    """g [B, T, H] in float64, however it was given."""
    if c.g is not None:
        return c.g.double()
    gamma = c.v.new_zeros(1) if c.g_gamma is None else c.g_gamma
    return gamma.double().expand(c.v.shape[:3])


def _chunks(c: Call, layout: Dense | Packed, log_decay: Tensor) -> Chunks:
    dtype, groups = state_dtype(c.v), (c.k.shape[2], -1)
    q, k = (layout.split(x, dtype).unsqueeze(2) for x in (c.q, c.k))
    v = layout.split(c.v, dtype).unflatten(1, groups)
    sums = running(layout.split(log_decay[..., None], torch.float64).squeeze(-1)).unflatten(1, groups)
    within = weights(sums, dtype)
    from_start, to_end = sums.to(dtype).exp(), within[..., -1, :]
    log_total = whole(sums[..., -1], from_start, to_end)
    return Chunks(layout, q * c.factor, k, v, within, from_start[..., None], to_end[..., None], log_total)


def _states(c: Call, x: Chunks) -> tuple[Tensor, Tensor]:
    """The states before each chunk and the final one, as they are carried."""
    return x.layout.scan(x.updates, x.log_total, _enter(c, c.initial_state))


def _read_out(c: Call, x: Chunks, states: Tensor) -> Tensor:
    """o as it is returned."""
    o = torch.addcmul(x.scores @ x.v, x.q @ states, x.from_start)
    return x.layout.join(o.flatten(1, 2), c.v.dtype)


def _gradients(
    c: Call, x: Chunks, do: Tensor, need: Need, dfinal: Tensor | None = None, dattn: Tensor | None = None
) -> Gradients:
    """The README's section on gradients. That of g_gamma is added up, and stays, in float64."""
    do = x.layout.split(do, x.v.dtype).unflatten(1, (c.k.shape[2], -1))
    updates = x.updates
    states, _ = x.layout.scan(updates, x.log_total, _enter(c, c.initial_state))
    dupdates = (x.q * x.from_start.nan_to_num(0.0, 0.0)).mT @ do
    dstates, dinitial = x.layout.scan(dupdates, x.log_total, _enter(c, dfinal), backwards=True)
    dproducts = do @ x.v.mT
    if dattn is not None:
        missing = x.layout.size - c.q.shape[1]
        dattn = pad(dattn.to(do.dtype), (0, missing, 0, missing))
        dproducts = dproducts + dattn.unflatten(1, (c.k.shape[2], -1)).unsqueeze(-3)
    dscores = dproducts * x.within
    dq = torch.addcmul(dscores @ x.k, do @ states.mT, x.from_start)
    dk = torch.addcmul(dscores.mT @ x.q, x.v @ dstates.mT, x.to_end)
    dv = dg = dgamma = None
    if need.v:
        dv = torch.addcmul(x.scores.mT @ do, x.k @ dstates, x.to_end)
        dv = x.layout.join(dv.flatten(1, 2), c.v.dtype)
    if need.g or need.g_gamma:
        # P_i multiplies what leaves step i and divides what enters it, and P_C what leaves the chunk.
        leaving = torch.addcmul(updates, x.log_total.to(do.dtype).exp()[..., None, None], states)
        dsums = torch.addcmul(x.q * dq, x.k, dk, value=-1).sum(-1)
        dsteps = dsums.flip(-1).cumsum(-1).flip(-1) + (leaving * dstates).sum((-2, -1))[..., None]
        dsteps = x.layout.join(dsteps.flatten(1, 2)[..., None], do.dtype).squeeze(-1)
        forgotten = (c.g if c.g is not None else c.g_gamma).to(do.dtype).exp() == 0
        dsteps = torch.where(forgotten, 0, dsteps)
        dg, dgamma = (dsteps.to(c.g.dtype), None) if need.g else (None, dsteps.sum((0, 1), dtype=torch.float64))
    return (
        x.layout.join(dq.sum(2) * c.factor, c.q.dtype) if need.q else None,
        x.layout.join(dk.sum(2), c.k.dtype) if need.k else None,
        dv,
        dg,
        dgamma,
        _leave(c, dinitial).to(c.initial_state.dtype) if need.initial_state else None,
    )


def _finish(c: Call, gradients: list[Tensor | None]) -> Gradients:
    """g_gamma belongs to all sequences: its gradient is rounded once they have been added up."""
    *others, dgamma = gradients[:5]
    return *others, None if dgamma is None else dgamma.to(c.g_gamma.dtype), *gradients[5:]


def _enter(c: Call, state: Tensor | None) -> Tensor | None:
    """A state of the call as [N, HK, G, K, V]."""
    if state is None:
        return None
    return (state.mT if c.state_v_first else state).to(state_dtype(c.v)).unflatten(1, (c.k.shape[2], -1))


def _leave(c: Call, state: Tensor) -> Tensor:
    """The inverse, contiguous."""
    state = state.flatten(1, 2)
    return (state.mT if c.state_v_first else state).clone(memory_format=torch.contiguous_format)
