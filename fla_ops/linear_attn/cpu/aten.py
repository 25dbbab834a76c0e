"""The normalisation as ATen calls, for float64, machines without a C++ compiler, and what `inlining()` compiles.

With z the sum that enters a chunk, and q_t . k_s summed over the steps of the chunk up to t:

    d_t = scale (sum_{s <= t} q_t . k_s + q_t . z) + 1e-10,    y_t = o_t / d_t

With w_t = -scale (dy_t . y_t) / d_t the gradients are do_t = dy_t / d_t, dq_t = w_t z_t, dk_s = sum_{t >= s} w_t q_t.
Tensors are [lanes, HK, G, rows, C, width], with G the value heads of a query and key head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fla_ops.common.cpu import slots
from fla_ops.common.cpu.layouts import Dense, Packed, layout_of
from fla_ops.common.cpu.sequences import one_by_one
from fla_ops.validation import state_dtype

from ..call import Gradients, Need, Normalize, Normalized, NormalizeStep

CHUNK = 64
EPSILON = 1e-10


def forward(c: Normalize) -> Normalized:
    """The quotient [B, T, H, V] in o's dtype, and the last z [N, 1, H, K] in the dtype that it is carried in."""

    def body(c: Normalize) -> Normalized:
        x = _chunks(c, c.o)
        y = (c.o / _denominator(c, x)).to(c.o.dtype, copy=True, memory_format=torch.contiguous_format)
        return Normalized(y, _leave(x.final) if c.output_final_z else None)

    return Normalized(*one_by_one(body, c, Normalized._fields))


def backward(c: Normalize, d: Normalized, need: Need, saved: Normalized) -> Gradients:
    """The gradients that are needed; the sums are computed again."""

    def body(c: Normalize, d: Normalized, need: Need, saved: Normalized) -> Gradients:
        x = _chunks(c, saved.normalized)
        return _gradients(c, x, d, need, saved.normalized)

    return tuple(one_by_one(body, c, Need._fields, d, need, saved))


def step(c: NormalizeStep) -> Tensor:
    """y [N, H, V] of one step, and its rows of z updated in place."""
    dtype, group = state_dtype(c.o), c.o.shape[1] // c.q.shape[1]
    query, key = (x.to(dtype).repeat_interleave(group, 1) for x in (c.q, c.k))
    held = slots.read(c.z, c.slots)
    sums = held.to(dtype) + key.unsqueeze(1)
    denominator = (query * sums.squeeze(1)).sum(-1, keepdim=True) * c.factor + EPSILON
    slots.write_(c.z, c.slots, held, sums)
    return slots.only_with_slots((c.o / denominator).to(c.o.dtype), c.slots)


class Chunks(NamedTuple):
    """One call in chunks."""

    layout: Dense | Packed
    q: Tensor
    k: Tensor
    before: Tensor  # z as it enters each chunk, [..., K, 1]
    final: Tensor  # the last z, [N, HK, G, K, 1]

    @property
    def groups(self) -> int:
        """G, the value heads of a query and key head."""
        return self.before.shape[2]


def _chunks(c: Normalize, o: Tensor) -> Chunks:
    layout, dtype, key_heads = layout_of(c, CHUNK), state_dtype(o), c.k.shape[2]
    q, k = (layout.split(x, dtype).unsqueeze(2) for x in (c.q, c.k))
    initial = None if c.initial_z is None else _enter(c, c.initial_z, dtype)
    before, final = _running(layout, k.sum(-2), o.shape[2] // key_heads, initial)
    return Chunks(layout, q, k, before, final)


def _denominator(c: Normalize, x: Chunks) -> Tensor:
    """d [B, T, H, 1]."""
    inside = (x.q @ x.k.mT).tril().sum(-1, keepdim=True)
    d = (inside + x.q @ x.before) * c.factor + EPSILON
    return x.layout.join(d.flatten(1, 2), d.dtype)


def _gradients(c: Normalize, x: Chunks, d: Normalized, need: Need, y: Tensor) -> Gradients:
    dtype, dy = state_dtype(y), d.normalized
    denominator = _denominator(c, x)
    dq = dk = do = dz = None
    if need.o:
        do = (dy / denominator).to(y.dtype, copy=True, memory_format=torch.contiguous_format)
    w = -c.factor * (dy.to(dtype) * y.to(dtype)).sum(-1, keepdim=True) / denominator
    w = x.layout.split(w, dtype).unflatten(1, (c.k.shape[2], -1))
    if need.q:
        dq = x.layout.join((w * (x.k.cumsum(-2) + x.before.mT)).sum(2), c.q.dtype)
    if need.k or need.initial_z:
        weighted = w * x.q
        dfinal = None if d.final_z is None else _enter(c, d.final_z, dtype)
        after, dinitial = _running(x.layout, weighted.sum(-2), x.groups, dfinal, backwards=True)
        if need.k:
            inside = weighted.flip(-2).cumsum(-2).flip(-2)
            dk = x.layout.join((inside + after.mT).sum(2), c.k.dtype)
        dz = _leave(dinitial).to(c.initial_z.dtype) if need.initial_z else None
    return dq, dk, do, dz


def _running(
    layout: Dense | Packed, added: Tensor, groups: int, initial: Tensor | None, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum before each chunk, [..., K, 1], and the last, of what each chunk adds [lanes, HK, G or 1, rows, K]."""
    added = added.expand(-1, -1, groups, -1, -1).unsqueeze(-1)
    kept = torch.zeros_like(added[..., 0, 0], dtype=torch.float64)
    return layout.scan(added, kept, initial, backwards)


def _enter(c: Normalize, z: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, 1, H, K] to [N, HK, G, K, 1]."""
    return z.squeeze(1).to(dtype).unflatten(1, (c.k.shape[2], -1)).unsqueeze(-1)


def _leave(z: Tensor) -> Tensor:
    """The inverse, contiguous."""
    return z.squeeze(-1).flatten(1, 2).unsqueeze(1).clone(memory_format=torch.contiguous_format)
