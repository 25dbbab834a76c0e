"""Where sequences are stopped for a look at their states. Nothing reads a value, and sizes may be symbolic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fla_ops.validation import Size


class Stops(NamedTuple):
    """N sequences, each with A stops, and the chunks that they fall into."""

    owner: Tensor  # [N * A]: the sequence of each stop
    inside: Tensor  # [N, A]: whether the sequence has so many steps
    chunks: Tensor  # [N, A]: whole chunks before the stop
    rest: Tensor  # [N, A]: steps after those
    lengths: Tensor  # [N]: of the sequences
    steps: Tensor  # [N * A, size]: the steps of the chunk that the stop is in, counted over all sequences

    def cut(self, x: Tensor | None) -> Tensor | None:
        """x [B, T, ...] at those steps, [N * A, size, ...]. Past the end of all sequences it is some step before."""
        if x is None:
            return None
        flat = x.flatten(0, 1)
        return flat[self.steps.clamp(max=flat.shape[0] - 1)]


def stops_of(at: Tensor, cu_seqlens: Tensor | None, batch: Size, time: Size, size: int) -> Stops:
    """The stops after at[n, a] steps of sequence n, in chunks of `size`."""
    first, lengths = spans_of(cu_seqlens, batch, time, at.device)
    at = at.long()
    inside = (at >= 0) & (at <= lengths[:, None])
    at = torch.where(inside, at, 0)
    chunks = at // size
    begin = (first[:, None] + chunks * size).flatten()
    owner = torch.arange(at.shape[0], device=at.device)[:, None].expand(at.shape).flatten()
    steps = begin[:, None] + torch.arange(size, device=at.device)
    return Stops(owner, inside, chunks, at - chunks * size, lengths, steps)


def spans_of(cu_seqlens: Tensor | None, batch: Size, time: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each sequence begins, counted over all of them, and its length; both [N]."""
    if cu_seqlens is not None:
        offsets = inside(cu_seqlens.long(), time) if cu_seqlens.is_cuda else cu_seqlens.long()
        return offsets[:-1], offsets.diff()
    first = torch.arange(batch, device=device) * time
    return first, torch.full_like(first, time)


def inside(offsets: Tensor, time: Size) -> Tensor:
    """Offsets as kernels take them, whose values nothing reads: their running maximum, from 0 to T."""
    between = offsets[1:-1].clamp(0, time)
    return torch.cat([offsets.new_zeros(1), between, offsets.new_full((1,), time)]).cummax(0).values


def is_empty(x: Tensor) -> bool:
    """Whether x [B, T, ...] has no step; one with symbolic sizes has some."""
    batch: Size
    time: Size
    batch, time = x.shape[:2]
    return isinstance(time, int) and isinstance(batch, int) and batch * time == 0
