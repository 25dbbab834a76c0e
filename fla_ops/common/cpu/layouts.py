"""Sequences in chunks, and the state that goes from chunk to chunk. Nothing reads a value, and sizes may be symbolic.

A layout turns steps [B, T, heads, width] into chunks [lanes, heads, rows, C, width]: a dense batch has a lane for each
sequence and a row for each chunk of it; a pack has one lane, and a row for each chunk of any of its sequences. Steps
past a sequence's end are zeros. With `reverse`, a sequence's steps are laid out from its last to its first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fla_ops.validation import Size, cu_seqlens_values_async

from .sequences import for_rows

BLOCK = 16  # rows whose matrix of decays is formed at once
FORGET = -1000.0  # exp of it is zero in any dtype, and it hides no digits that matter in a sum of log decays


def running(log_decay: Tensor, backwards: bool = False) -> Tensor:
    """The running sum of log decays [..., C], in their float64.

    One of -inf counts as FORGET, so that a difference of two sums is never NaN.
    """
    log_decay = log_decay.clamp(min=FORGET)
    return log_decay.flip(-1).cumsum(-1).flip(-1) if backwards else log_decay.cumsum(-1)


def weights(sums: Tensor, dtype: torch.dtype, backwards: bool = False) -> Tensor:
    """D_ij = exp(sums_i - sums_j) for j <= i (for j >= i), else 0: sums [..., C] to [..., C, C], each rounded once."""
    decay = (sums[..., :, None] - sums[..., None, :]).to(dtype).exp()
    return decay.triu() if backwards else decay.tril()


def whole(total: Tensor, *decays: Tensor) -> Tensor:
    """The log decay over a whole chunk, [...], NaN where one of the decays [..., C] inside it is NaN or overflows.

    It alone tells later chunks so: what is multiplied by such a decay is left out of the state.
    """
    for decay in decays:
        total = torch.where(decay.isfinite().all(-1), total, torch.nan)
    return total


def recur(log_decay: Tensor, added: Tensor, backwards: bool = False) -> Tensor:
    """x_r = exp(log_decay_r) x_{r-1} + added_r with x_{-1} = 0, or `backwards` with r + 1 for r - 1.

    log_decay is [..., R] in float64, added [..., R, D]. Inside blocks of rows first, then from block to block: there is
    no R x R matrix. A decay of NaN makes all that follows NaN, and must not meet the zeros of what comes before.
    """
    rows: Size = log_decay.shape[-1]
    size = min(BLOCK, rows) if isinstance(rows, int) else BLOCK
    blocks = (rows + size - 1) // size
    missing = blocks * size - rows
    sums = running(_longer(log_decay, missing, axis=-1).unflatten(-1, (blocks, size)), backwards)
    within = weights(sums, added.dtype, backwards)
    local = within @ _longer(added, missing, axis=-2).unflatten(-2, (blocks, size))
    last = 0 if backwards else -1
    total = whole(sums[..., last], within[..., last, :])
    ends = torch.where(total[..., None].isnan(), 0, local[..., last, :])
    ends = weights(running(total, backwards), added.dtype, backwards) @ ends  # x at each block's end
    entering = pad(ends, (0, 0, 0, 1))[..., 1:, :] if backwards else pad(ends, (0, 0, 1, 0))[..., :-1, :]
    x = torch.addcmul(local, sums.to(added.dtype).exp()[..., None], entering.unsqueeze(-2))
    x = x.flatten(-3, -2)
    if isinstance(rows, int):
        return x[..., :rows, :]
    # A slice would have min(rows, ...) rows, which a product compares with others: that guards on the length.
    return x.index_select(-2, torch.arange(rows, device=x.device))


def recur_apart(log_decay: Tensor, added: Tensor, begins: Tensor, backwards: bool = False) -> Tensor:
    """recur over rows of many sequences, each of which begins at some row: what is no number in one reaches none of the
    others. begins is [R].
    """
    sound = added.isfinite() & ~log_decay.isnan()[..., None]
    x = recur(log_decay.nan_to_num(0.0, 0.0), torch.where(sound, added, 0), backwards)
    kept = torch.where(begins, FORGET, 0.0).to(log_decay.dtype).expand_as(log_decay)
    return torch.where(recur(kept, (~sound).to(added.dtype), backwards) > 0, torch.nan, x)


class Dense:
    """A batch of sequences of one length; without a size, in one chunk each."""

    def __init__(self, batch: Size, time: Size, size: int | None = None, reverse: bool = False) -> None:
        self.batch, self.time, self.reverse = batch, time, reverse
        self.size = _some(time) if size is None else size
        self.rows = 1 if size is None else _rows((time + size - 1) // size)

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, heads, width] to [B, heads, rows, C, width] in `dtype`, contiguous."""
        x = _longer(x.flip(1) if self.reverse else x, self.rows * self.size - self.time, axis=-3)
        chunks = x.reshape(self.batch, self.rows, self.size, *x.shape[2:]).permute(0, 3, 1, 2, 4)
        return chunks.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def join(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of split."""
        heads, width = y.shape[1], y.shape[4]
        steps = y.reshape(self.batch, heads, self.rows * self.size, width)[:, :, : self.time].transpose(1, 2)
        return (steps.flip(1) if self.reverse else steps).to(dtype, copy=True, memory_format=torch.contiguous_format)

    def scan(
        self, updates: Tensor, log_total: Tensor, initial: Tensor | None, backwards: bool = False
    ) -> tuple[Tensor, Tensor]:
        """S <- exp(log_total) S + update along the rows: S before each row, and S after the last; `backwards` from the
        last row to the first. updates [B, ..., rows, K, V], log_total [B, ..., rows], S [B, ..., K, V].
        """
        start = torch.zeros_like(updates[..., :1, :, :]) if initial is None else initial.unsqueeze(-3)
        if backwards:
            added, logs = torch.cat([updates[..., 1:, :, :], start], -3), pad(log_total[..., 1:], (0, 1))
        else:
            added, logs = torch.cat([start, updates[..., :-1, :, :]], -3), pad(log_total[..., :-1], (1, 0))
        states = recur(logs, added.flatten(-2), backwards).unflatten(-1, updates.shape[-2:])
        last = 0 if backwards else -1
        return states, _advance(states[..., last, :, :], log_total[..., last], updates[..., last, :, :])

    def every(self, steps: int, states: Tensor, final: Tensor) -> Tensor:
        """S after every so many steps, a multiple of the size, [C, ..., K, V]: one sequence after the other, from what
        scan returned.
        """
        after = torch.arange(self.time // steps, device=states.device) * (steps // self.size) + steps // self.size
        return torch.cat([states, final.unsqueeze(-3)], -3).index_select(-3, after).movedim(-3, 1).flatten(0, 1)

    def after(self, chunks: Tensor, owner: Tensor, states: Tensor, final: Tensor) -> Tensor:
        """S of sequence owner[r] after its first chunks[r], [R, ..., K, V], from what scan returned."""
        return torch.cat([states, final.unsqueeze(-3)], -3).movedim(-3, 1)[owner, chunks]


class Packed:
    """Sequences laid end to end. The number of rows is a bound that holds whatever the offsets are; rows past the last
    are empty.
    """

    def __init__(self, offsets: Tensor, time: Size, size: int, reverse: bool = False) -> None:
        cu_seqlens_values_async(offsets, time)
        starts, ends = offsets[:-1].long(), offsets[1:].long()
        sequences = starts.shape[0]
        self.rows = _rows((time + sequences * (size - 1)) // size)
        chunks = (ends - starts + size - 1) // size
        after = chunks.cumsum(0)
        self.empty = chunks == 0
        self.time, self.size, self.lengths, self.chunks = time, size, ends - starts, chunks
        self.first_row, self.last_row = (after - chunks).clamp(max=self.rows - 1), (after - 1).clamp(min=0)
        # of each row: its sequence, which chunk of it, which steps of the pack
        row = torch.arange(self.rows, device=offsets.device)
        owner = owners(after, self.rows)
        used = owner < sequences
        self.sequence = owner.clamp(max=sequences - 1)
        index = row - self.first_row[self.sequence]
        self.first, self.last = ~used | (index == 0), ~used | (index == chunks[self.sequence] - 1)
        a, b = starts[self.sequence][:, None], ends[self.sequence][:, None]
        step = index[:, None] * size + torch.arange(size, device=offsets.device)
        inside = used[:, None] & (step < b - a)
        self.steps = torch.where(inside, b - 1 - step if reverse else a + step, time)
        # of each step of the pack: where it lies in the chunks
        step = torch.arange(time, device=offsets.device)
        owner = owners(ends, time).clamp(max=sequences - 1)
        self.place = (after - chunks)[owner] * size + (ends[owner] - 1 - step if reverse else step - starts[owner])

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[1, T, heads, width] to [1, heads, rows, C, width] in `dtype`, contiguous."""
        chunks = pad(x[0], (0, 0, 0, 0, 0, 1))[self.steps].permute(2, 0, 1, 3)[None]
        return chunks.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def join(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of split."""
        return y[0].flatten(1, 2).transpose(0, 1)[self.place].to(dtype)[None]

    def scan(
        self, updates: Tensor, log_total: Tensor, initial: Tensor | None, backwards: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As Dense.scan along each sequence, with S [N, ..., K, V]: its first row forgets the one before it."""
        by, begins, ends = (-1, self.last, self.first_row) if backwards else (1, self.first, self.last_row)
        if initial is None:
            initial = updates.new_zeros((self.empty.shape[0], *updates.shape[1:-3], *updates.shape[-2:]))
        logs = torch.where(begins, FORGET, log_total.roll(by, -1))
        entering = initial[self.sequence].movedim(0, -3)[None]
        added = torch.where(begins[:, None, None], entering, updates.roll(by, -3))
        states = recur_apart(logs, added.flatten(-2), begins, backwards).unflatten(-1, updates.shape[-2:])
        states_at, updates_at = (x[0][..., ends, :, :] for x in (states, updates))
        final = _advance(states_at, log_total[0][..., ends], updates_at).movedim(-3, 0)
        return states, torch.where(for_rows(self.empty, final), initial, final)

    def every(self, steps: int, states: Tensor, final: Tensor) -> Tensor:
        """As Dense.every. The number of rows is a bound; those past the last are zeros."""
        count = self.lengths // steps
        ends = count.cumsum(0)
        row = torch.arange(self.time // steps, device=states.device)
        owner = owners(ends, self.time // steps)
        used = owner < ends.shape[0]
        owner = owner.clamp(max=ends.shape[0] - 1)
        found = self.after((row - (ends - count)[owner] + 1) * (steps // self.size), owner, states, final)
        return torch.where(for_rows(used, found), found, 0)

    def after(self, chunks: Tensor, owner: Tensor, states: Tensor, final: Tensor) -> Tensor:
        """As Dense.after."""
        before = states[0].movedim(-3, 0)[(self.first_row[owner] + chunks).clamp(0, self.rows - 1)]
        return torch.where(for_rows(chunks < self.chunks[owner], before), before, final[owner])


def owners(ends: Tensor, count: Size) -> Tensor:
    """The sequence of each of `count` places, [count], where sequence n ends before place ends[n]; N past the last."""
    after = ends.new_zeros(count + 1).scatter_add(0, ends.clamp(0, count), torch.ones_like(ends))
    return after.cumsum(0)[:-1]


def layout_of(c: Any, size: int) -> Dense | Packed:
    """The steps of a call in chunks of `size`."""
    if c.cu_seqlens is None:
        return Dense(*c.q.shape[:2], size, c.reverse)
    return Packed(c.cu_seqlens, c.q.shape[1], size, c.reverse)


def _advance(state: Tensor, log_total: Tensor, update: Tensor) -> Tensor:
    return torch.addcmul(update, log_total.to(state.dtype).exp()[..., None, None], state)


def _some(size: Size) -> Size:
    """At least one; a size that is symbolic is."""
    return max(size, 1) if isinstance(size, int) else size


def _rows(count: Size) -> Size:
    """At least one row. A number that is symbolic gets an empty row more: one row alone would be a case of its own, and
    a graph would serve either that or all others.
    """
    return max(count, 1) if isinstance(count, int) else count + 1


def _longer(x: Tensor, by: Size, axis: int) -> Tensor:
    """x with zeros behind it on one of its axes, counted from the last."""
    if isinstance(by, int) and by == 0:
        return x
    return pad(x, (0, 0) * (-axis - 1) + (0, by))
