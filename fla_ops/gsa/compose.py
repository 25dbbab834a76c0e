"""gsa's operators for servers, on a CPU and a GPU alike: rows of both pools, gathered for other operators and put back.

Nothing waits for a device. On a CPU, where values can be read, wrong ones are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import slots as rows
from fla_ops.common.cpu.sequences import for_rows

from . import checks
from .call import CHUNK_FORWARD, Advance, Prefill


def prefill(c: Prefill) -> Tensor:
    """o of every sequence from its rows of the pools, which then hold its final states."""
    checks.eager_prefill(c)
    slots = _known(c.slots, len(c.state_k))
    held = [_read(pool, slots) for pool in c.pools]
    initial = held if c.fresh is None else [torch.where(for_rows(c.fresh, x), 0, x) for x in held]
    o: Tensor
    o, *final = torch.ops.fla.chunk_gsa_forward(*CHUNK_FORWARD.arguments_of(c.call(*initial)))[:3]
    for pool, before, after in zip(c.pools, held, final, strict=True):
        rows.write_(pool, slots, before, after)
    if c.slots is None or slots is None:
        return o
    instead = torch.where(c.slots == -1, 0.0, torch.nan).to(o.dtype)
    if c.cu_seqlens is None:
        return torch.where(for_rows(slots >= 0, o), o, for_rows(instead, o))
    step = torch.arange(o.shape[1], device=o.device)
    owner = torch.searchsorted(c.cu_seqlens[1:].long(), step, right=True).clamp(max=len(slots) - 1)
    return torch.where(for_rows(slots[owner] >= 0, o[0]), o[0], for_rows(instead[owner], o[0]))[None]


def advance(c: Advance) -> None:
    """The first `accepted` steps of each sequence, one decode step after the other."""
    checks.eager_advance(c)
    time, dtype = c.k.shape[1], valid.state_dtype(c.v)
    if c.accepted.device.type == "cpu":
        valid.step_counts(c.accepted, time)
    slots = _known(c.slots, len(c.state_k))
    held = [_read(pool, slots) for pool in c.pools]
    states = [x.to(dtype, copy=True) for x in held]
    row, unread = torch.arange(len(c.accepted), device=c.k.device), c.k.new_zeros(len(c.k), *c.k.shape[2:])
    for t in range(time):
        given = (x[:, t] for x in (c.k, c.v, c.s, c.g))
        torch.ops.fla.gsa_step_(unread, *given, *states, 1.0, torch.where(t < c.accepted, row, -1))
    for pool, before, after in zip(c.pools, held, states, strict=True):
        rows.write_(pool, slots, before, after)


def _known(slots: Tensor | None, count: int) -> Tensor | None:
    """The slots; -1 for those outside of the pools, which only a device has."""
    if slots is None:
        return None
    if slots.device.type == "cpu":
        valid.slot_values(slots, count)
    return torch.where(slots < count, slots.clamp(min=-1), -1)


def _read(pool: Tensor, slots: Tensor | None) -> Tensor:
    """The row of each sequence; any row for slot -1."""
    return pool if slots is None else pool.index_select(0, slots.clamp(min=0))
