"""gsa on a CPU, step by step: the recurrent form, one sequence after the other, and the in-place decode step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fla_ops import validation as valid

from .. import checks
from ..call import Call, Gradients, Need, Outputs, Step
from . import abc, pools
from .sequences import alone, empty_gradients, empty_states, places

SMALL = 1 << 15  # products for one sequence and state that take no longer as elementwise ones than as a matrix product
States = tuple[Tensor, Tensor]  # [H, K, M] and [H, M, V], updated in place


@dataclass(frozen=True)
class Steps:
    """The steps of one sequence: [T, H, width], for the queries [T, H, G, width]."""

    order: range  # in which the recurrence runs
    q: Tensor  # scaled
    k: Tensor
    v: Tensor
    s: Tensor
    decay: Tensor

    def fade(self, t: int, states: States) -> None:
        """Both states decay on entering step t."""
        states[0].mul_(self.decay[t].unsqueeze(1))
        states[1].mul_(self.decay[t].unsqueeze(2))

    def write(self, t: int, states: States) -> None:
        """Both states take in step t."""
        states[0].addcmul_(self.k[t].unsqueeze(2), self.s[t].unsqueeze(1))
        states[1].addcmul_(self.s[t].unsqueeze(2), self.v[t].unsqueeze(1))


def forward(c: Call) -> Outputs:
    """Both states, updated in place at every step."""
    checks.eager(c)
    o = c.v.new_empty((*c.q.shape[:3], c.v.shape[3]))
    final_k, final_v = empty_states(c, c.output_final_state)
    for at in places(c):
        x, states = _walk(alone(c, at))
        outputs = x.v.new_empty((*x.q.shape[:3], x.v.shape[2]))
        for t in x.order:
            x.fade(t, states)
            x.write(t, states)
            torch.bmm((x.q[t] @ states[0]).softmax(-1), states[1], out=outputs[t])
        at.of(o).copy_(outputs.flatten(1, 2))
        if c.output_final_state:
            final_k[at.n], final_v[at.n] = states
    return Outputs(o, final_k, final_v)


def backward(c: Call, d: Outputs, need: Need) -> Gradients:
    """The states run again with time for what is read, their gradients run against it for what is written."""
    gradients = empty_gradients(c, need)
    for at in places(c):
        one = alone(c, at)
        x, states = _walk(one)
        dfinal = (None if y is None else y[at.n] for y in (d.final_k, d.final_v))
        dstates = _states(x, *dfinal)
        do = _fresh(at.of(d.o), x.q.dtype).unflatten(1, x.q.shape[1:3])
        dq, p, dx, read = _read_gradients(x, do, states, dstates)
        dk, dv, ds, later = _write_gradients(x, do, p, dx, dstates)
        along = read - x.s * later
        dg = along.cumsum(0) if c.reverse else along.flip(0).cumsum(0).flip(0)
        dg.masked_fill_(x.decay == 0, 0)
        if c.g is None and need.s:
            ds = abc.gradient(one.s, one.g, ds, dg, c.reverse)
        for whole, part in zip(gradients, ((dq * one.scale).flatten(1, 2), dk, dv, ds, dg), strict=False):
            if whole is not None:
                at.of(whole).copy_(part)
        for whole, part in zip(gradients[5:], dstates, strict=True):
            if whole is not None:
                whole[at.n] = part
    return gradients


def _read_gradients(x: Steps, do: Tensor, states: States, dfinals: States) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq (without the scale), p, dx, and what each step reads from earlier ones; moves the states to the end.

    The last step reads for the final states too.
    """
    dq, p = torch.empty_like(x.q), x.q.new_empty((*x.q.shape[:3], x.s.shape[2]))
    dx, read = torch.empty_like(p), torch.zeros_like(x.s)
    for t in x.order:
        x.fade(t, states)
        if t == x.order[-1]:
            read[t] = (states[0] * dfinals[0]).sum(1) + (states[1] * dfinals[1]).sum(2)
        earlier, dearlier = x.q[t] @ states[0], do[t] @ states[1].mT
        x.write(t, states)
        torch.softmax(x.q[t] @ states[0], -1, out=p[t])
        pdp = p[t] * (do[t] @ states[1].mT)
        torch.sub(pdp, p[t] * pdp.sum(-1, keepdim=True), out=dx[t])
        torch.bmm(dx[t], states[0].mT, out=dq[t])
        read[t] += (p[t] * dearlier).addcmul_(earlier, dx[t]).sum(1)
    return dq, p, dx, read


def _write_gradients(
    x: Steps, do: Tensor, p: Tensor, dx: Tensor, dstates: States
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dk, dv, ds, and the part of ds from the reads of later steps; moves the states' gradients to the start."""
    dk, dv, ds, later = (torch.empty_like(y) for y in (x.k, x.v, x.s, x.s))
    for t in reversed(x.order):
        if t == x.order[-1]:
            later[t] = 0
        else:
            _slot_gradient(x, t, dstates, later[t])
        dstates[0].baddbmm_(x.q[t].mT, dx[t])
        dstates[1].baddbmm_(p[t].mT, do[t])
        torch.bmm(dstates[0], x.s[t].unsqueeze(2), out=dk[t].unsqueeze(2))
        torch.bmm(x.s[t].unsqueeze(1), dstates[1], out=dv[t].unsqueeze(1))
        _slot_gradient(x, t, dstates, ds[t])
        x.fade(t, dstates)
    return dk, dv, ds, later


def _slot_gradient(x: Steps, t: int, dstates: States, out: Tensor) -> None:
    torch.bmm(x.k[t].unsqueeze(1), dstates[0], out=out.unsqueeze(1))
    out.unsqueeze(2).baddbmm_(dstates[1], x.v[t].unsqueeze(2))


def _walk(one: Call) -> tuple[Steps, States]:
    """The steps of one sequence (see `sequences.alone`) and the states before them, in the dtype of the computation."""
    dtype, order = valid.state_dtype(one.v), range(len(one.q))[:: -1 if one.reverse else 1]
    q, k, v, s, g = (_fresh(x, dtype) for x in one[:5])
    x = Steps(order, q.unflatten(1, (k.shape[1], -1)).mul_(one.scale), k, v, s, g.exp_())
    return x, _states(x, one.initial_k, one.initial_v)


def _fresh(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in memory of its own: how a product rounds may depend on where its operands lie."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _states(x: Steps, state_k: Tensor | None, state_v: Tensor | None) -> States:
    """Fresh states in the dtype of the computation; zeros where none is given."""
    (heads, key), slots, value = x.k.shape[1:], x.s.shape[2], x.v.shape[2]
    first, second = (
        x.k.new_zeros(shape) if state is None else x.k.new_empty(shape).copy_(state)
        for state, shape in ((state_k, (heads, key, slots)), (state_v, (heads, slots, value)))
    )
    return first, second


def step(c: Step) -> Tensor:
    """One step for N sequences, rows of both pools updated in place, block by block while these are in the cache.

    Small states are read as sums of elementwise products, others by a product for each sequence: see sequences.py.
    """
    checks.eager_step(c)
    (state_k, state_v), (sequences, heads, value) = c.pools, c.v.shape
    (key, slots), group = state_k.shape[2:], c.q.shape[1] // heads
    rows = list(range(sequences)) if c.slots is None else valid.slot_values(c.slots, len(state_k))
    dtype = valid.state_dtype(c.v)
    q = _cast(c.q, dtype).reshape(sequences, heads, group, key) * c.factor
    k, v, s, decay = _cast(c.k, dtype), _cast(c.v, dtype), _cast(c.s, dtype), _cast(c.g, dtype).exp()
    o = v.new_zeros((*q.shape[:3], value))
    read = _read_each if heads * group * slots * max(key, value) > SMALL else _read
    for some, at in pools.blocks(rows, heads * slots * (key + value)):
        given = (q, k, v, s, decay)
        queries, keys, values, written, kept = given if some == slice(0, sequences) else (x[some] for x in given)
        held = state_k[at]
        state = _cast(held, dtype).mul_(kept.unsqueeze(2)).addcmul_(keys.unsqueeze(3), written.unsqueeze(2))
        p = read(queries, state).softmax(3)
        pools.update(state_k, at, held, state)
        held = state_v[at]
        state = _cast(held, dtype).mul_(kept.unsqueeze(3)).addcmul_(written.unsqueeze(3), values.unsqueeze(2))
        o[some] = read(p, state)
        pools.update(state_v, at, held, state)
    return _cast(o.flatten(1, 2), c.v.dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself where it has the dtype, without the call, which would take as long as an operation on it."""
    return x if x.dtype is dtype else x.to(dtype)


def _read(x: Tensor, states: Tensor) -> Tensor:
    """x [n, H, G, U] times the states [n, H, U, W], where each element is a sum of its own."""
    return (x.unsqueeze(4) * states.unsqueeze(2)).sum(3)


def _read_each(x: Tensor, states: Tensor) -> Tensor:
    """The same with a product for each sequence."""
    y = x.new_empty((*x.shape[:3], states.shape[3]))
    for one, state, out in zip(x.unbind(), states.unbind(), y.unbind(), strict=True):
        torch.bmm(one, state, out=out)
    return y
