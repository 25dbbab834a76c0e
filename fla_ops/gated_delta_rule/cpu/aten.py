"""The gated delta rule as ATen calls: for float64, for machines without a C++ compiler, and for `inlining()`.

With C steps in a chunk, P the running sum of g in it, S the state that enters it, and q already scaled:

    E   = (I + A)^-1 (v - a K S)                               A_ij = D_ij (k_i . k_j) beta_j for j < i
    o_i = a_i S^T q_i + sum_{j <= i} D_ij (q_i . k_j) u_j      u_j = beta_j e_j
    S'  = a_C S + sum_j b_j k_j u_j^T

D_ij = exp(P_i - P_j), a_i = exp(P_i), b_j = exp(P_C - P_j); row e_i of E is what the state got wrong at step i. The
README derives this. Every form is this, from any state to any state; a step is the recurrence once. Nothing is updated
in place but the pool of a step.

Tensors are [lanes, HK, G, rows, C, width], with G the value heads of a query and key head; layouts.py has them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fla_ops.common.cpu import slots
from fla_ops.common.cpu.layouts import layout_of, running, weights
from fla_ops.common.cpu.sequences import one_by_one
from fla_ops.validation import state_dtype

from .. import checks
from ..call import Call, Gradients, Need, Outputs, Step
from .scan import Maps, scan

CHUNK = 64  # steps in a chunk, at most: longer ones only cost more products
BLOCK = 16  # rows of a triangle that are solved one after the other
EPSILON = 1e-6  # beside the squared norm of a query or key


def forward(c: Call) -> Outputs:
    """o [B, T, H, V], and the final state in the dtype that it is carried in."""
    checks.eager(c)

    def body(c: Call) -> Outputs:
        x = Chunks(c)
        states, final = x.states
        o = torch.addcmul(x.scores @ x.changes(states), x.q @ states, x.from_start)
        o = x.layout.join(o.flatten(1, 2), c.v.dtype)
        return Outputs(o, _leave(c, final) if c.output_final_state else None)

    return Outputs(*one_by_one(body, c, Outputs._fields))


def backward(c: Call, d: Outputs, need: Need) -> Gradients:
    """The gradients that are needed; scores and states are computed again."""
    return tuple(one_by_one(_gradients, c, Need._fields, d, need))


def step(c: Step) -> Tensor:
    """o [N, H, V] of one step, and its rows of the pool updated in place."""
    checks.eager_step(c)
    dtype, groups = state_dtype(c.v), (c.q.shape[1], -1)
    held = slots.read(c.pool, c.slots)
    state, value = (x.to(dtype).unflatten(1, groups) for x in (held, c.v[:, :, None]))  # [N, HK, G, K or 1, V]
    query, key = (normalized(c, x)[0][:, :, None, :, None] for x in (c.q, c.k))
    beta = c.beta.to(dtype).unflatten(1, groups)[..., None, None]
    if c.g is not None:
        state = state * c.g.to(dtype).exp().unflatten(1, groups)[..., None, None]
    state = state + key * (beta * (value - (key * state).sum(-2, keepdim=True)))
    o = (query * c.factor * state).sum(-2).flatten(1, 2).to(c.v.dtype)
    slots.write_(c.pool, c.slots, held, state.flatten(1, 2))
    return slots.only_with_slots(o, c.slots)


def normalized(c: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """q or k as it is used, and what it was multiplied by, in the state's dtype."""
    x = x.to(state_dtype(c.v))
    if not c.use_qk_l2norm_in_kernel:
        return x, None
    inverse = torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)
    return x * inverse, inverse


class Chunks:
    """One call in chunks, and what both directions compute of it."""

    def __init__(self, c: Call) -> None:
        dtype, groups = state_dtype(c.v), (c.k.shape[2], -1)
        self.c = c
        self.layout = layout_of(c, min(c.chunk_size, CHUNK))
        q, k = (self.layout.split(normalized(c, x)[0], dtype).unsqueeze(2) for x in (c.q, c.k))
        self.q, self.k = q * c.factor, k
        self.v = self.layout.split(c.v, dtype).unflatten(1, groups)
        self.beta = self.layout.split(c.beta[..., None], dtype).unflatten(1, groups)
        g = (c.v.new_zeros(1) if c.g is None else c.g).double().expand(c.v.shape[:3])
        sums = running(self.layout.split(g[..., None], torch.float64).squeeze(-1)).unflatten(1, groups)
        self.within = weights(sums, dtype)  # D [..., C, C]
        self.from_start = sums.to(dtype).exp()[..., None]  # a [..., C, 1]
        self.to_end = self.within[..., -1, :, None]  # b [..., C, 1]

    @property
    def total(self) -> Tensor:
        """a_C [..., 1, 1]."""
        return self.from_start[..., -1:, :]

    @cached_property
    def scores(self) -> Tensor:
        """D_ij (q_i . k_j)"""
        return self.q @ self.k.mT * self.within

    @cached_property
    def between_keys(self) -> Tensor:
        """D_ij (k_i . k_j) for j < i."""
        return (self.k @ self.k.mT * self.within).tril(-1)

    @cached_property
    def solved(self) -> Tensor:
        """(I + A)^-1"""
        return _inverse(self.between_keys * self.beta.mT)

    @cached_property
    def readers(self) -> Tensor:
        """(I + A)^-1 a K: what the errors take from the state."""
        return self.solved @ (self.k * self.from_start)

    @cached_property
    def writers(self) -> Tensor:
        """b_j beta_j k_j: what the errors give to the state."""
        return self.k * (self.to_end * self.beta)

    @cached_property
    def states(self) -> tuple[Tensor, Tensor]:
        """S before each chunk, and after the last."""
        left = self.writers.mT
        maps = Maps(self.total, left, self.readers, left @ (self.solved @ self.v))
        return scan(self.layout, maps, _enter(self.c, self.c.initial_state))

    def errors(self, states: Tensor) -> Tensor:
        """E of the chunks that these states enter."""
        return self.solved @ self.v - self.readers @ states

    def changes(self, states: Tensor) -> Tensor:
        """U of the same."""
        return self.beta * self.errors(states)


def _inverse(lower: Tensor) -> Tensor:
    """(I + A)^-1 of a strictly lower triangle A [..., C, C]: by forward substitution in blocks of 16 rows, which then
    grow together by twos.
    """
    size = lower.shape[-1]
    blocks = torch.stack([lower[..., i : i + BLOCK, i : i + BLOCK] for i in range(0, size, BLOCK)], -3)
    identity = torch.eye(BLOCK, dtype=lower.dtype, device=lower.device).expand_as(blocks)
    rows = identity[..., :1, :]
    for i in range(1, BLOCK):
        row = identity[..., i : i + 1, :] - blocks[..., i : i + 1, :i] @ rows
        rows = torch.cat([rows, row], -2)
    found = [rows[..., i, :, :] for i in range(size // BLOCK)]
    while len(found) > 1:
        half = size // len(found)
        merged = []
        for i, (upper, under) in enumerate(zip(found[::2], found[1::2], strict=True)):
            start = 2 * half * i
            beside = lower[..., start + half : start + 2 * half, start : start + half]
            corner = -(under @ (beside @ upper))
            top = torch.cat([upper, torch.zeros_like(upper)], -1)
            merged.append(torch.cat([top, torch.cat([corner, under], -1)], -2))
        found = merged
    return found[0]


def _gradients(c: Call, d: Outputs, need: Need) -> Gradients:
    """The README's section on gradients."""
    x = Chunks(c)
    do = x.layout.split(d.o, x.v.dtype).unflatten(1, (c.k.shape[2], -1))
    from_outputs = x.scores.mT @ do  # of u
    solved_outputs = x.readers.mT @ (x.beta * from_outputs)
    maps = Maps(x.total, x.readers.mT, x.writers, (x.q * x.from_start).mT @ do - solved_outputs)
    dstates, dinitial = scan(x.layout, maps, _enter(c, d.final_state), backwards=True)
    derrors = x.beta * (from_outputs + (x.k * x.to_end) @ dstates)
    dv = x.solved.mT @ derrors
    found: dict[str, Tensor | None] = dict.fromkeys(Need._fields)
    if need.v:
        found["v"] = x.layout.join(dv.flatten(1, 2), c.v.dtype)
    if need.initial_state:
        found["initial_state"] = _leave(c, dinitial).to(c.initial_state.dtype)
    if need.q or need.k or need.g or need.beta:
        states, _ = x.states
        found |= _gradients_inside(c, x, do, dv, (states, dstates), need)
    return tuple(found.values())


def _gradients_inside(
    c: Call, x: Chunks, do: Tensor, dv: Tensor, around: tuple[Tensor, Tensor], need: Need
) -> dict[str, Tensor | None]:
    """Those of q, k, g and beta."""
    states, dstates = around
    errors = x.errors(states)
    changes = x.beta * errors
    found: dict[str, Tensor | None] = {}
    if need.beta:
        dchanges = x.scores.mT @ do + (x.k * x.to_end) @ dstates - x.between_keys.mT @ dv
        found["beta"] = _join_steps(x, errors * dchanges).to(c.beta.dtype)
    if not (need.q or need.k or need.g):
        return found
    dscores = do @ changes.mT * x.within
    dbetween = (dv @ changes.mT * x.within).tril(-1)
    dq = torch.addcmul(dscores @ x.k, do @ states.mT, x.from_start)
    reads = torch.addcmul(dbetween @ x.k, dv @ states.mT, x.from_start)
    writes = dscores.mT @ x.q - dbetween.mT @ x.k + x.to_end * (changes @ dstates.mT)
    if need.q:
        found["q"] = _before_normalization(c, c.q, x.layout.join(dq.sum(2) * c.factor, dq.dtype))
    if need.k:
        found["k"] = _before_normalization(c, c.k, x.layout.join((writes - reads).sum(2), dq.dtype))
    if need.g:
        # P_i multiplies what step i reads and divides what it writes, and P_C multiplies what leaves the chunk.
        leaving = torch.addcmul((x.k * x.to_end).mT @ changes, x.total, states)
        dsums = (x.q * dq - x.k * (reads + writes)).sum(-1)
        dsteps = dsums.flip(-1).cumsum(-1).flip(-1) + (leaving * dstates).sum((-2, -1))[..., None]
        dg = _join_steps(x, dsteps[..., None])
        found["g"] = torch.where(c.g.to(dg.dtype).exp() == 0, 0, dg).to(c.g.dtype)
    return found


def _join_steps(x: Chunks, y: Tensor) -> Tensor:
    """[B, T, H] from chunks, summed over their width."""
    return x.layout.join(y.sum(-1, keepdim=True).flatten(1, 2), y.dtype).squeeze(-1)


def _before_normalization(c: Call, x: Tensor, dx: Tensor) -> Tensor:
    """The gradient of q or k as it was given, from that of what was used."""
    used, inverse = normalized(c, x)
    if inverse is not None:
        dx = inverse * (dx - used * (used * dx).sum(-1, keepdim=True))
    return dx.to(x.dtype)


def _enter(c: Call, state: Tensor | None) -> Tensor | None:
    """A state of the call as [N, HK, G, K, V]."""
    if state is None:
        return None
    return (state.mT if c.state_v_first else state).to(state_dtype(c.v)).unflatten(1, (c.k.shape[2], -1))


def _leave(c: Call, state: Tensor) -> Tensor:
    """The inverse, contiguous."""
    state = state.flatten(1, 2)
    return (state.mT if c.state_v_first else state).clone(memory_format=torch.contiguous_format)
