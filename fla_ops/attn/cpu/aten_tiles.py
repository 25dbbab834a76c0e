"""attn on a CPU, heads first and cut into tiles: blocks of rows against the columns that hold something visible.

The decay between a row and a column before its block, whose first row is a, is split: G_i - G_j = (G_i - G_a) + (G_a -
G_j). float32 holds both parts, and they enter the scores as channels of the matrix product: the keys carry G_a - G_j
for each query head of the group and a one, the queries pick theirs and carry G_i - G_a less the row's reference. Only
inside the diagonal block, where the parts could cancel, is the difference itself needed.

Scores and decays are logarithms to base two: on a CPU exp2 takes -inf in its stride, and exp does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fla_ops.validation import cu_seqlens_values, state_dtype

from ..call import Call
from . import decay

ROWS = 256
COLUMNS = 512
ELEMENTS = 2**20  # of one tile, over all heads that are computed together: it should stay in the cache
NEGLIGIBLE = {
    torch.float32: -80.0,
    torch.float64: -400.0,
}  # a weight's exponent; products with it stay above slow denormals
LOG2E = math.log2(math.e)
NEVER = float("-inf")

Piece = tuple[slice, slice, slice]  # a sequence, its steps, and the key heads that are computed together


class Tile(NamedTuple):
    """Columns of a block of rows."""

    first: int
    last: int
    masked: bool  # some of its pairs are hidden
    negligible: bool  # some of its weights may be


def block_rows(group: int, window: int | None) -> int:
    """Rows of a block: fewer where many query heads share a key head, or where a window would hide most of it."""
    limit = ELEMENTS // (COLUMNS * group) if window is None else min(window, ELEMENTS // (COLUMNS * group))
    return max(32, min(ROWS, 1 << (limit.bit_length() - 1)))


def runs(x: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, int, int]]:
    """Which sequences lie in which steps of x [B, T, ...]: all of a dense batch at once, packed ones each on its
    own.
    """
    batch, time = x.shape[:2]
    if cu_seqlens is None:
        return [(slice(0, batch), 0, time)]
    offsets = cu_seqlens_values(cu_seqlens, time)
    return [(slice(n, n + 1), a, b) for n, (a, b) in enumerate(pairwise(offsets))]


def pieces(c: Call) -> Iterator[Piece]:
    """Slices of the inputs that cover all rows which see a key.

    Sequences come one at a time: which kernel multiplies a batch of matrices, and with that the last bits of each, may
    depend on how many there are.
    """
    key_heads = c.k.shape[2]
    group = c.q.shape[2] // key_heads
    for _, start, end in runs(c.q, c.cu_seqlens):
        time = end - start
        if time == 0 or c.window_size == 0:
            continue
        rows = min(block_rows(group, c.window_size), time)
        some = max(1, ELEMENTS // (group * rows * max(rows, min(COLUMNS, time))))
        for b in range(c.q.shape[0]):
            for h in range(0, key_heads, some):
                yield slice(b, b + 1), slice(start, end), slice(h, min(h + some, key_heads))


def query_heads(x: Tensor, piece: Piece, key_heads: int, dtype: torch.dtype) -> Tensor:
    """A copy of a piece of x [B, T, HQ, D], [P, G, T, D]: its key heads, and the query heads of each."""
    sequence, steps, heads = piece
    x = x[sequence, steps].unflatten(2, (key_heads, -1))[0, :, heads].permute(1, 2, 0, 3)
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def set_query_heads(x: Tensor, piece: Piece, key_heads: int, part: Tensor) -> None:
    """The inverse of query_heads: write part [P, G, T, D] into a piece of x [B, T, HQ, D]."""
    sequence, steps, heads = piece
    x[sequence, steps].unflatten(2, (key_heads, -1))[0, :, heads].copy_(part.permute(2, 0, 1, 3))


@dataclass
class Run:
    """The steps of one piece, whose matrices are copies: which kernel multiplies them may depend on where they lie."""

    queries: Tensor  # [P, G, T, K], scaled by scale * log2(e)
    keys: Tensor  # [P, T, K + channels]
    values: Tensor  # [P, T, V]
    window: int | None
    reach: Tensor  # [P, G, T], no product of a row is larger; not set without decay
    sums: Tensor | None = None  # [P, G, T] float64, of log2 decays
    since: Tensor | None = None  # [P, G, T], the first step after which nothing forgets
    buffer: Tensor = field(init=False)
    extremes: tuple[Tensor, ...] = field(init=False)  # [P, G, T / COLUMNS], smallest and largest sum

    def __post_init__(self) -> None:
        """Take memory for the scores of one tile."""
        pairs, group, time, self.width = self.queries.shape
        self.rows = min(block_rows(group, self.window), time)
        columns = max(self.rows, min(COLUMNS, time))
        self.buffer = self.queries.new_empty(pairs * group * self.rows * columns)
        self.floor = NEGLIGIBLE[self.queries.dtype]
        if self.sums is not None:
            found = [torch.aminmax(part, dim=-1) for part in self.sums.split(COLUMNS, -1)]
            self.extremes = tuple(torch.stack(x, -1) for x in zip(*found, strict=True))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First row, and one past the last, of each block."""
        time = self.queries.shape[2]
        for a in range(0, time, self.rows):
            yield a, min(a + self.rows, time)

    def tiles(self, a: int, b: int, reference: Tensor) -> list[Tile]:
        """Tiles left of the diagonal. What they leave out is negligible beside exp2(reference), [P, G, rows, 1]."""
        low, high = (0, 0) if self.window is None else (max(0, a - self.window + 1), max(0, b - self.window))
        if self.since is not None:
            low, high = max(low, int(self.since[..., a].min())), max(high, int(self.since[..., b - 1].max()))
        high = min(high, a)
        edges = {low, high, a, *range((low // COLUMNS + 1) * COLUMNS, a, COLUMNS)} if low < a else set()
        spans = list(pairwise(sorted(edges)))
        if self.sums is None:
            return [Tile(first, last, first < high, False) for first, last in spans]
        dropped, some = self._negligible(self.sums, a, b, reference)
        return [
            Tile(first, last, first < high, some[first // COLUMNS])
            for first, last in spans
            if not dropped[first // COLUMNS]
        ]

    def _negligible(self, sums: Tensor, a: int, b: int, reference: Tensor) -> tuple[list[bool], list[bool]]:
        """Of each COLUMNS columns before row b: whether all weights are negligible, whether some may be."""
        start = sums[..., a : a + 1]
        gain, reach = sums[..., a:b] - start - reference.squeeze(-1), self.reach[..., a:b]
        most = (gain + reach).amax(-1, keepdim=True)
        least = (gain - reach).amin(-1, keepdim=True)
        smallest, largest = (x[..., : (b - 1) // COLUMNS + 1] for x in self.extremes)
        dropped = (most + start - smallest < self.floor - 1).all(0).all(0)
        visible = (least + start - largest >= self.floor + 1).all(0).all(0)
        return dropped.tolist(), (~visible).tolist()

    def extended(self, a: int, b: int, low: int, reference: Tensor) -> Tensor:
        """Queries [P, G * rows, K + channels] whose products with keys `low` to `a` are scores less `reference`."""
        pairs, group = self.queries.shape[:2]
        rows = self.queries.new_empty((pairs, group, b - a, self.keys.shape[2]))
        rows[..., : self.width] = self.queries[:, :, a:b]
        rows[..., -1:] = -reference
        if self.sums is not None:
            rows[..., self.width : -1] = torch.eye(group, dtype=rows.dtype, device=rows.device)[:, None]
            rows[..., -1] += self.sums[..., a:b] - self.sums[..., a : a + 1]
            before = self.sums[..., a : a + 1] - self.sums[..., low:a]
            # Where this is not finite the rows' own sums are not either, and the group's other heads may not see it.
            self.keys[:, low:a, self.width : -1] = before.nan_to_num_(0, 0, 0).mT
        return rows.flatten(1, 2)

    def scores(self, rows: Tensor, a: int, tile: Tile) -> Tensor:
        """x_ij less the rows' reference, [P, G * rows, columns], in the buffer; -inf where hidden."""
        first, last = tile.first, tile.last
        x = self._take(rows.shape[1], last - first)
        torch.bmm(rows, self.keys[:, first:last].mT, out=x)
        if tile.masked:
            b = a + rows.shape[1] // self.queries.shape[1]
            x.unflatten(1, (-1, b - a)).masked_fill_(self._hidden(a, b, first, last), NEVER)
        return x

    def diagonal(self, a: int, b: int, reference: Tensor | None) -> Tensor:
        """The same for columns a to b, with the reference [P, G, rows, 1] if there is one."""
        rows = self.queries[:, :, a:b].flatten(1, 2)
        keys = self.keys[:, a:b, : self.width].mT
        x = self._take(rows.shape[1], b - a)
        torch.bmm(rows, keys, out=x)
        per_head = x.unflatten(1, (-1, b - a))
        if self.sums is not None:
            sums = self.sums[..., a:b]
            high = sums.to(x.dtype)
            low = (sums - high).to(x.dtype)
            per_head += high[..., :, None] - high[..., None, :]
            per_head += low[..., :, None] - low[..., None, :]
        if reference is not None:
            per_head.sub_(reference)
        per_head.masked_fill_(self._hidden(a, b, a, b), NEVER)  # what is hidden may be NaN
        return x

    def _take(self, rows: int, columns: int) -> Tensor:
        pairs = self.queries.shape[0]
        return self.buffer[: pairs * rows * columns].view(pairs, rows, columns)

    def weights(self, x: Tensor, negligible: bool) -> Tensor:
        """exp2(x) in place; zero where it is negligible, if some may be."""
        return (torch.threshold_(x, self.floor, NEVER) if negligible else x).exp2_()

    def _hidden(self, a: int, b: int, first: int, last: int) -> Tensor:
        """Which pairs of rows a to b and columns first to last do not see each other."""
        row = torch.arange(a, b, device=self.keys.device)[:, None]
        column = torch.arange(first, last, device=self.keys.device)
        hidden = column > row
        if self.window is not None:
            hidden |= column <= row - self.window
        if self.since is not None and bool((self.since[..., b - 1] > first).any()):
            hidden = hidden | (column < self.since[..., a:b, None])
        return hidden


def prepare(c: Call, piece: Piece) -> Run:
    """The run of a piece, in the dtype that is computed in."""
    key_heads, key_width = c.k.shape[2:]
    sequence, steps, heads = piece
    queries = query_heads(c.q, piece, key_heads, state_dtype(c.q)).mul_(c.factor * LOG2E)
    pairs, group, time, _ = queries.shape
    keys = queries.new_empty((pairs, time, key_width + (1 if c.g is None else group + 1)))
    keys[..., :key_width] = c.k[sequence, steps, heads][0].transpose(0, 1)
    keys[..., -1] = 1
    values = queries.new_empty((pairs, time, c.v.shape[3])).copy_(c.v[sequence, steps, heads][0].transpose(0, 1))
    if c.g is None:
        return Run(queries, keys, values, c.window_size, queries.new_empty(0))
    sums, since = decay.sums(query_heads(c.g[..., None], piece, key_heads, c.g.dtype).squeeze(-1))
    sums *= LOG2E
    longest = torch.linalg.vector_norm(keys[..., :key_width], dim=-1).amax(-1)
    reach = torch.linalg.vector_norm(queries, dim=-1).mul_(longest[:, None, None])
    return Run(queries, keys, values, c.window_size, reach, sums, since)
