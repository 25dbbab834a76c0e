"""The layouts of chunks.py for code that is traced: sizes may be symbolic, nothing is read back, no loop over rows.

The recurrence from row to row becomes products with matrices of decays: inside blocks of rows, then across the blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fla_ops.validation import cu_seqlens_values_async

from . import decay as decays

BLOCK = 16  # rows whose decay matrix is formed at once


class TracedDense:
    """A batch of sequences of one length."""

    eager = False

    def __init__(self, batch: Any, time: Any, size: int) -> None:
        self.batch, self.time, self.size = batch, time, size
        self.rows = (time + size - 1) // size

    def lengths(self, device: torch.device) -> Tensor:
        """Steps in each row."""
        return (self.time - self.size * torch.arange(self.rows, device=device)).clamp(max=self.size)

    def split(self, x: Tensor, dtype: torch.dtype, factor: float | None = None) -> Tensor:
        """[B, T, heads, D] to [rows, B, heads, C, D] in `dtype`, contiguous, times a factor."""
        _, _, heads, width = x.shape
        x = pad(x.to(dtype), (0, 0, 0, 0, 0, self.rows * self.size - self.time))
        x = x if factor is None else x * factor
        return (
            x.reshape(self.batch, self.rows, self.size, heads, width)
            .permute(1, 0, 3, 2, 4)
            .clone(memory_format=torch.contiguous_format)
        )

    def join(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of split."""
        _, _, heads, _, width = y.shape
        x = y.permute(1, 0, 3, 2, 4).reshape(self.batch, self.rows * self.size, heads, width)
        return x[:, : self.time].to(dtype).clone(memory_format=torch.contiguous_format)

    def scan(
        self, updates: Tensor, total: Tensor | None, initial: Tensor | None, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """S <- total * S + update over the rows: S before each row, and S after the last."""
        if reverse:
            states, final = self.scan(updates.flip(0), None if total is None else total.flip(0), initial)
            return states.flip(0), final
        start = updates.new_zeros(updates.shape[1:]) if initial is None else initial
        total = torch.ones_like(updates[..., :1, :1]) if total is None else total.expand(self.rows, *total.shape[1:])
        states = recur(
            torch.cat([torch.zeros_like(total[:1]), total[:-1]]), torch.cat([start.unsqueeze(0), updates[:-1]])
        )
        return states, total[-1] * states[-1] + updates[-1]


class TracedPacked:
    """Sequences laid end to end. The number of rows is a bound that holds whatever the offsets are; rows past the last
    are empty.
    """

    eager = False

    def __init__(self, offsets: Tensor, time: Any, size: int) -> None:
        cu_seqlens_values_async(offsets, time)
        self.time, self.size = time, size
        sequences = offsets.shape[0] - 1
        self.rows = (time + sequences * (size - 1)) // size
        offsets = offsets.to(torch.int64)
        chunks = (offsets[1:] - offsets[:-1] + (size - 1)) // size
        ends = chunks.cumsum(0)
        row = torch.arange(self.rows, device=offsets.device)
        sequence = torch.searchsorted(ends, row, right=True)
        self.used = sequence < sequences
        self.sequence = sequence.clamp(max=sequences - 1)
        index = row - (ends - chunks)[self.sequence]
        self.first = (index == 0) | ~self.used
        self.last = (index == chunks[self.sequence] - 1) | ~self.used
        self.last_row, self.first_row = (ends - 1).clamp(min=0), (ends - chunks).clamp(max=self.rows - 1)
        self.empty = chunks == 0
        first_step = offsets[self.sequence] + index * size
        self._lengths = torch.where(self.used, offsets[self.sequence + 1] - first_step, 0).clamp(0, size)
        step = torch.arange(size, device=offsets.device)
        self.inside = step < self._lengths[:, None]
        self.index = (first_step[:, None] + step).clamp(0, time - 1)
        # where each step lies in the chunked layout
        position = torch.arange(time, device=offsets.device)
        owner = torch.searchsorted(offsets[1:].contiguous(), position, right=True).clamp(max=sequences - 1)
        self.place = (ends - chunks)[owner] * size + position - offsets[owner]

    def lengths(self, device: torch.device) -> Tensor:
        """Steps in each row."""
        return self._lengths

    def split(self, x: Tensor, dtype: torch.dtype, factor: float | None = None) -> Tensor:
        """[1, T, heads, D] to [rows, 1, heads, C, D] in `dtype`, contiguous, times a factor."""
        rows = torch.where(self.inside[:, :, None, None], x[0][self.index].to(dtype), 0)
        rows = rows if factor is None else rows * factor
        return rows.transpose(1, 2).clone(memory_format=torch.contiguous_format).unsqueeze(1)

    def join(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of split."""
        return y.squeeze(1).transpose(1, 2).flatten(0, 1)[self.place].to(dtype).unsqueeze(0)

    def scan(
        self, updates: Tensor, total: Tensor | None, initial: Tensor | None, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """S <- total * S + update along each sequence: S before each row, and S after each sequence's last row."""
        total = torch.ones_like(updates[..., :1, :1]) if total is None else total.expand(self.rows, *total.shape[1:])
        starts, ends = (self.last, self.first_row) if reverse else (self.first, self.last_row)
        if initial is None:
            initial = updates.new_zeros((self.empty.shape[0], *updates.shape[2:]))
        order = (lambda x: x.flip(0)) if reverse else (lambda x: x)
        begin = order(starts).reshape(-1, *[1] * (updates.dim() - 1))
        entering = initial[order(self.sequence)].unsqueeze(1)
        decay, added = order(total), order(updates)
        states = order(
            recur(
                torch.where(begin, 0, torch.cat([decay[:1], decay[:-1]])),
                torch.where(begin, entering, torch.cat([added[:1], added[:-1]])),
            )
        )
        final = total[ends, 0] * states[ends, 0] + updates[ends, 0]
        return states, torch.where(self.empty.reshape(-1, *[1] * (final.dim() - 1)), initial, final)


def recur(factor: Tensor, added: Tensor) -> Tensor:
    """x_r = factor_r x_{r-1} + added_r over the rows, x_{-1} = 0, as products with matrices of decays.

    factor [rows, ..., 1, 1] in [0, inf), added [rows, ..., K, V].
    """
    rows, (key, value) = added.shape[0], added.shape[-2:]
    blocks = (rows + BLOCK - 1) // BLOCK
    missing = blocks * BLOCK - rows
    lead = added.shape[1:-2]
    flat = pad(added.flatten(1), (0, 0, 0, missing)).reshape(blocks, BLOCK, *lead, key * value)
    logs = pad(factor.log().expand(rows, *lead, 1, 1).flatten(1), (0, 0, 0, missing)).reshape(blocks, BLOCK, *lead)
    logs, flat = logs.movedim(1, -1), flat.movedim(1, -2)  # [blocks, ..., BLOCK], [blocks, ..., BLOCK, K * V]
    inside = decays.per_step(logs)
    local = inside.within @ flat
    across = decays.per_step(inside.total[..., 0, 0].log().movedim(0, -1))  # [..., blocks]
    ends = across.within @ local[..., -1, :].movedim(0, -2)  # x at the end of each block
    before = pad(ends, (0, 0, 1, 0))[..., :-1, :].movedim(-2, 0)
    x = local + inside.from_start * before.unsqueeze(-2)
    return x.movedim(-2, 1).reshape(blocks * BLOCK, *lead, key, value)[:rows]
