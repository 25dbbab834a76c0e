"""What updates rows of gsa's pools, as ATen calls for graphs: no value is read, and every sequence runs at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fla_ops.common.cpu import slots
from fla_ops.common.cpu.layouts import owners
from fla_ops.common.cpu.sequences import for_rows
from fla_ops.validation import state_dtype

from ..call import Advance, Call, Prefill, Step
from . import traced


def step(c: Step) -> Tensor:
    """o [N, HQ, V] of one step, and its rows of both pools updated in place."""
    dtype = state_dtype(c.v)
    q = c.q.to(dtype).unflatten(1, (c.v.shape[1], -1)) * c.factor
    k, v, s, decay = (x.to(dtype) for x in (c.k, c.v, c.s, c.g.to(dtype).exp()))
    held_k, held_v = (slots.read(pool, c.slots) for pool in c.pools)
    state_k = held_k.to(dtype) * decay.unsqueeze(2) + k.unsqueeze(3) * s.unsqueeze(2)
    state_v = held_v.to(dtype) * decay.unsqueeze(3) + s.unsqueeze(3) * v.unsqueeze(2)
    o = ((q @ state_k).softmax(-1) @ state_v).flatten(1, 2).to(c.v.dtype)
    _write(c, (held_k, held_v), (state_k, state_v))
    return slots.only_with_slots(o, c.slots)


def prefill(c: Prefill) -> Tensor:
    """o of every sequence from its rows of the pools, which then hold its final states."""
    held = [slots.read(pool, c.slots) for pool in c.pools]
    initial = held if c.fresh is None else [torch.where(for_rows(c.fresh, x), 0, x) for x in held]
    o, *final = traced.forward(c.call(*initial))
    _write(c, held, final)
    if c.slots is None or c.cu_seqlens is None:
        return slots.only_with_slots(o, c.slots)
    owner = owners(c.cu_seqlens[1:].long(), o.shape[1]).clamp(max=c.slots.shape[0] - 1)
    return slots.only_with_slots(o[0], c.slots[owner])[None]


def advance(c: Advance) -> None:
    """The first `accepted` steps of each sequence: the others have no key, value or decay."""
    time = c.k.shape[1]
    torch._assert_async(((c.accepted >= 0) & (c.accepted <= time)).all(), "accepted must be in [0, T]")
    held = [slots.read(pool, c.slots) for pool in c.pools]
    taken = (torch.arange(time, device=c.k.device) < c.accepted[:, None])[..., None, None]  # [N, T, 1, 1]
    k, v, g = (torch.where(taken, x, 0) for x in (c.k, c.v, c.g))
    final = traced.forward(Call(k, k, v, c.s, g, 1.0, held[0], held[1], output_final_state=True))[1:]
    new = [torch.where(for_rows(c.accepted > 0, x), y, x.to(y.dtype)) for x, y in zip(held, final, strict=True)]
    _write(c, held, new)


def _write(c: Step | Prefill | Advance, held: Sequence[Tensor], updated: Sequence[Tensor | None]) -> None:
    for pool, before, after in zip(c.pools, held, updated, strict=True):
        slots.write_(pool, c.slots, before, after)
