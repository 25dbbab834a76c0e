"""Packed sequences that cross the ranks of a mesh dimension.

At most one sequence crosses the border between two pieces of time, so one state for each border is exchanged whatever
the number of sequences. Everything is a tensor of fixed shape: nothing is read back, and no length is compiled in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """How one rank's steps cut packed sequences, in the direction in which a recurrence runs.

    offsets   [N + 1], of the sequences within the piece: most are empty
    enters    [N], the sequence that comes from another piece, if any
    leaves    [N], the sequence that goes on to another piece, if any
    starts    [N], sequences whose state starts here
    ends      [N], sequences whose state ends here
    entering  [T], steps of the sequence that enters
    leaving   [T], steps of the sequence that leaves
    through   [], whether one sequence enters and leaves
    """

    offsets: Tensor
    enters: Tensor
    leaves: Tensor
    starts: Tensor
    ends: Tensor
    entering: Tensor
    leaving: Tensor
    through: Tensor

    @staticmethod
    def of(offsets: Tensor, low: Any, steps: Any, is_last: bool, reverse: bool) -> Piece:
        """The piece of steps [low, low + steps). A sequence without steps starts and ends where its offset is."""
        high = low + steps
        start, end = offsets[:-1], offsets[1:]
        some = end > start
        starts_here = (start >= low) & ((start < high) | is_last)
        ends_here = torch.where(some, (end > low) & (end <= high), starts_here)
        below = some & (start < low) & (end > low)  # has steps before the piece and in it
        above = some & (start < high) & (end > high)
        position = torch.arange(steps, device=offsets.device) + low
        until = torch.where(below, end, low).amax()
        since = torch.where(above, start, high).amin()
        of_below, of_above = position < until, position >= since
        ways = (below, above, starts_here, ends_here, of_below, of_above)
        if reverse:
            ways = (above, below, ends_here, starts_here, of_above, of_below)
        return Piece((offsets - low).clamp(0, steps), *ways, (below & above).any())


def row(x: Tensor, marked: Tensor) -> Tensor:
    """The marked row [1, ...] of x [N, ...], zeros where none is."""
    return torch.where(_like(marked, x), x, 0.0).sum(0, keepdim=True)


def rows(marked: Tensor, x: Tensor | None, otherwise: Tensor | None = None) -> Tensor | None:
    """x in the marked rows, the other one elsewhere; None stands for zeros."""
    like = otherwise if x is None else x
    if like is None:
        return None
    shape = _like(marked, like)
    return torch.where(shape, 0.0 if x is None else x, 0.0 if otherwise is None else otherwise.to(like.dtype))


def _like(marked: Tensor, x: Tensor) -> Tensor:
    return marked.view(-1, *([1] * (x.dim() - 1)))
