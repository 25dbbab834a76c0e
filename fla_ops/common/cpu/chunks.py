"""Cutting sequences into chunks and back, for ATen implementations.

A chunk layout turns [B, T, heads, D] into [rows, lanes, heads, C, D]. A dense batch has one lane per sequence and one
row per chunk position; packed sequences have one lane, and a row per chunk of any sequence. Steps past a sequence's
end are zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fla_ops.validation import cu_seqlens_values

Span = tuple[slice, int, int]  # which sequences; their first row or step, and one past the last
Factor = Tensor | float | None


def runs(x: Tensor, cu_seqlens: Tensor | None) -> list[Span]:
    """Which sequences lie in which steps of x [B, T, ...]: all of a dense batch at once, packed ones each on its
    own.
    """
    batch, time = x.shape[:2]
    if cu_seqlens is None:
        return [(slice(0, batch), 0, time)]
    offsets = cu_seqlens_values(cu_seqlens, time)
    return [(slice(n, n + 1), a, b) for n, (a, b) in enumerate(itertools.pairwise(offsets))]


class _Chunks:
    """What both layouts share: the recurrence from row to row."""

    eager = True  # values may be read
    rows: int
    spans: list[Span]

    def scan(
        self,
        updates: Tensor,
        total: Tensor | None,
        initial: Tensor | None,
        reverse: bool = False,
        decayed: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """S <- total * S + update along each sequence: S before each row, and S after each sequence's last row.

        updates [rows, lanes, ...]; total [rows or 1, lanes or 1, ...], None for no decay; initial [N, ...], None for
        zeros. With reverse=True the rows run backwards, and "before" a row is what comes from the row after it.
        With decayed=True the rows see total * S instead of S (and, backwards, S <- total * (S + update)).
        """
        states = torch.empty_like(updates)
        sequences = sum(n.stop - n.start for n, _, _ in self.spans)
        final = updates.new_empty((sequences, *updates.shape[2:]))
        added, before = updates.unbind(0), states.unbind(0)
        factor = None if total is None else total.expand(self.rows, *total.shape[1:]).unbind(0)
        for n, first, last in self.spans:
            order = range(last - 1, first - 1, -1) if reverse else range(first, last)
            carried = [*(before[row] for row in order), final[n]]
            if initial is None:
                carried[0].zero_()
            else:
                carried[0].copy_(initial[n])
            for i, row in enumerate(order):
                if factor is None:
                    torch.add(added[row], carried[i], out=carried[i + 1])
                elif not decayed:
                    torch.addcmul(added[row], factor[row], carried[i], out=carried[i + 1])
                elif reverse:
                    torch.add(added[row], carried[i], out=carried[i + 1]).mul_(factor[row])
                else:
                    torch.add(added[row], carried[i].mul_(factor[row]), out=carried[i + 1])
        return states, final


class DenseChunks(_Chunks):
    """A batch of sequences of one length."""

    def __init__(self, batch: int, time: int, size: int) -> None:
        self.batch, self.time, self.size = batch, time, size
        self.whole, self.tail = divmod(time, size)
        self.rows, self.lanes = self.whole + (self.tail > 0), batch
        self.spans: list[Span] = [(slice(0, batch), 0, self.rows)]

    def lengths(self, device: torch.device) -> Tensor:
        """Steps in each row."""
        steps = torch.full((self.rows,), self.size, device=device)
        if self.tail:
            steps[-1] = self.tail
        return steps

    def split(self, x: Tensor, dtype: torch.dtype, factor: Factor = None) -> Tensor:
        """[B, T, heads, D] to [rows, B, heads, C, D] in `dtype`, contiguous, times a factor [rows, B, heads, C, 1]."""
        _, _, heads, width = x.shape
        out = x.new_empty((self.rows, self.batch, heads, self.size, width), dtype=dtype)
        if self.tail:
            out[-1, :, :, self.tail :] = 0
        for chunked, flat, scale in self._pieces(out, x, factor):
            _fill(chunked, flat, scale)
        return out

    def join(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of split."""
        _, _, heads, _, width = y.shape
        x = y.new_empty((self.batch, self.time, heads, width), dtype=dtype)
        self.write(y, x)
        return x

    def write(self, y: Tensor, x: Tensor, factor: Factor = None) -> None:
        """The same into x [B, T, heads, D], times a factor of the shape that split takes."""
        for chunked, flat, scale in self._pieces(y, x, factor):
            _fill(flat, chunked, scale)

    def _pieces(self, chunked: Tensor, flat: Tensor, factor: Factor) -> Iterator[tuple[Tensor, Tensor, Factor]]:
        """Views of both layouts over the same elements, and their factor: the whole chunks, and the tail."""
        full = self.whole * self.size
        varies = isinstance(factor, Tensor)
        if self.whole:
            yield (
                chunked[: self.whole],
                flat[:, :full].unflatten(1, (self.whole, self.size)).permute(1, 0, 3, 2, 4),
                factor[: self.whole] if varies else factor,
            )
        if self.tail:
            yield (
                chunked[-1, :, :, : self.tail],
                flat[:, full:].transpose(1, 2),
                factor[-1, :, :, : self.tail] if varies else factor,
            )


class PackedChunks(_Chunks):
    """Sequences laid end to end: offsets[n] to offsets[n + 1] are the steps of sequence n."""

    def __init__(self, offsets: list[int], size: int, device: torch.device) -> None:
        self.time, self.size, self.lanes = offsets[-1], size, 1
        self.spans: list[Span] = []
        starts: list[int] = []
        ends: list[int] = []
        for n, (start, end) in enumerate(itertools.pairwise(offsets)):
            first = len(starts)
            starts += range(start, end, size)
            ends += [end] * (len(starts) - first)
            self.spans.append((slice(n, n + 1), first, len(starts)))
        self.rows = len(starts)
        first_step = torch.tensor(starts, device=device, dtype=torch.int64)
        self._lengths = (torch.tensor(ends, device=device, dtype=torch.int64) - first_step).clamp_(max=size)
        step = torch.arange(size, device=device)
        self._inside = step < self._lengths[:, None]
        self._index = (first_step[:, None] + step).clamp_(max=max(self.time - 1, 0))
        self._row_step = self._inside.flatten().nonzero().squeeze(1)

    def lengths(self, device: torch.device) -> Tensor:
        """Steps in each row."""
        return self._lengths

    def split(self, x: Tensor, dtype: torch.dtype, factor: Factor = None) -> Tensor:
        """[1, T, heads, D] to [rows, 1, heads, C, D] in `dtype`, contiguous, times a factor [rows, 1, heads, C, 1]."""
        rows = x[0].index_select(0, self._index.flatten()).unflatten(0, (self.rows, self.size))
        rows = torch.where(self._inside[:, :, None, None], rows.to(dtype), 0)
        rows = rows.transpose(1, 2).contiguous().unsqueeze(1)
        return rows if factor is None else rows.mul_(factor)

    def join(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of split."""
        flat = y.squeeze(1).transpose(1, 2).flatten(0, 1)
        return flat.index_select(0, self._row_step).to(dtype).unsqueeze(0)


Chunks = DenseChunks | PackedChunks


def _fill(target: Tensor, source: Tensor, factor: Factor) -> None:
    """target = source * factor, rounded once, to target's dtype."""
    if factor is None:
        target.copy_(source)
    elif source.dtype is target.dtype:
        torch.mul(source, factor, out=target)
    elif source.element_size() < target.element_size():
        target.copy_(source).mul_(factor)
    else:
        target.copy_(source * factor)
