"""Rows of a state pool for ATen decode steps: read, and written back. Both can be traced."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops import validation as valid

from .sequences import for_rows, is_traced


def read(pool: Tensor, slots: Tensor | None) -> Tensor:
    """The row of each sequence; any row for slot -1."""
    if slots is None:
        return pool
    if is_traced(pool):
        inside = (slots >= -1) & (slots < pool.shape[0])
        torch._assert_async(inside.all(), "slots must be -1 or in [0, P)")
    else:
        valid.slot_values(slots, pool.shape[0])
    return pool.index_select(0, slots.clamp(min=0))


def write_(pool: Tensor, slots: Tensor | None, held: Tensor, updated: Tensor) -> None:
    """Put the updated rows where `held = read(pool, slots)` came from. Slot -1 has no row: there, a row that some other
    sequence writes is written once more with the same numbers, or, where no sequence has a slot, one with its own.
    """
    updated = updated.to(pool.dtype)
    if slots is None:
        pool.copy_(updated)
        return
    used = slots >= 0
    writer = torch.where(used, torch.arange(slots.shape[0], device=slots.device), slots.argsort(descending=True)[:1])
    written = torch.where(for_rows(used[writer], updated), updated[writer], held[writer])
    pool.index_copy_(0, slots[writer].clamp(min=0).long(), written)


def only_with_slots(x: Tensor, slots: Tensor | None) -> Tensor:
    """Zeros in the rows of x [N, ...] whose slot is -1."""
    return x if slots is None else torch.where(for_rows(slots >= 0, x), x, 0)
