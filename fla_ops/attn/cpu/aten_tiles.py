"""attn on a CPU, heads first and cut into tiles: blocks of rows against the columns that hold something visible.

Rows are numbered by where they lie among the columns. The decay between a row and a column before its block, whose
first row is a, is split: G_i - G_j = (G_i - G_a) + (G_a - G_j), where a is the last column if rows come after all of
them. float32 holds both parts, and they enter the scores as channels of the matrix product: the keys carry G_a - G_j
for each query head of the group and a one, the queries pick theirs and carry G_i - G_a less the row's reference. Only
inside the diagonal block, where the parts could cancel, is the difference itself needed. Where products are capped, the
channels are multiplied apart from them.

Scores and decays are logarithms to base two: on a CPU exp2 takes -inf in its stride, and exp does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fla_ops.validation import cu_seqlens_values, state_dtype

from ..call import AFTER, SAME, Call, Prefill
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


class Piece(NamedTuple):
    """Rows of a sequence, its columns, and the key heads that are computed together."""

    sequence: slice
    rows: slice
    columns: slice
    heads: slice
    ahead: int  # where the first row lies among the columns

    @property
    def is_blank(self) -> bool:
        """Whether the rows see no column."""
        return self.columns.start == self.columns.stop


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


def sequences(c: Call | Prefill) -> list[tuple[slice, slice]]:
    """Which rows and columns each sequence has: those of a dense batch all have the same."""
    time, count = c.q.shape[1], c.k.shape[1]
    if c.cu_seqlens is None:
        return [(slice(0, time), slice(0, count))]
    rows = cu_seqlens_values(c.cu_seqlens, time)
    columns = rows
    if c.place != SAME:
        columns = cu_seqlens_values(c.key_offsets, count, "cu_seqlens_k", "TK")
    return [(slice(*a), slice(*b)) for a, b in zip(pairwise(rows), pairwise(columns), strict=True)]


def pieces(c: Call | Prefill) -> Iterator[Piece]:
    """Slices of the inputs that cover all rows.

    Sequences come one at a time: which kernel multiplies a batch of matrices, and with that the last bits of each, may
    depend on how many there are.
    """
    key_heads = c.k.shape[2]
    group = c.q.shape[2] // key_heads
    for rows, columns in sequences(c):
        time, count = rows.stop - rows.start, columns.stop - columns.start
        ahead = c.ahead(time, count)
        first, last = max(0, -ahead), time  # of the rows that see a column
        if c.window_size is not None:
            last = min(time, count + c.window_size - 1 - ahead)
        if count == 0 or c.window_size == 0 or last <= first:
            first = last = 0
        for b in range(c.q.shape[0]):
            for start, stop in ((0, first), (last, time)):
                if start < stop:
                    blank = slice(rows.start + start, rows.start + stop)
                    yield Piece(slice(b, b + 1), blank, slice(0, 0), slice(0, key_heads), 0)
            if first == last:
                continue
            seeing = slice(rows.start + first, rows.start + last)
            height = min(block_rows(group, c.window_size), last - first)
            some = max(1, ELEMENTS // (group * height * max(height, min(COLUMNS, count))))
            for h in range(0, key_heads, some):
                heads = slice(h, min(h + some, key_heads))
                yield Piece(slice(b, b + 1), seeing, columns, heads, ahead + first)


def query_heads(x: Tensor, piece: Piece, steps: slice, key_heads: int) -> Tensor:
    """The steps of a piece in x [B, T, HQ, D], [P, G, T, D]: its key heads, and the query heads of each."""
    return x[piece.sequence, steps].unflatten(2, (key_heads, -1))[0, :, piece.heads].permute(1, 2, 0, 3)


def copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


@dataclass
class Run:
    """The steps of one piece, whose matrices are copies: which kernel multiplies them may depend on where they lie.

    Decays are in powers of two, and so is the cap of the products.
    """

    queries: Tensor  # [P, G, T, K], scaled by scale * log2(e)
    keys: Tensor  # [P, TK, K + channels]
    values: Tensor  # [P, TK, V]
    window: int | None
    ahead: int = 0  # where the first row lies among the columns
    after: bool = False  # rows come after all columns
    softcap: float | None = None
    reach: Tensor | None = None  # [P, G, T], no product of a row is larger; with decay
    sums: Tensor | None = None  # [P, G, TK] float64, of decays
    since: Tensor | None = None  # [P, G, TK], the first step after which nothing forgets
    decay: Tensor | None = None  # [P, G, T], from the last column to a row
    slopes: Tensor | None = None  # where a gradient is taken, memory for the derivatives of capped products
    buffer: Tensor = field(init=False)
    extremes: tuple[Tensor, ...] = field(init=False)  # [P, G, TK / COLUMNS], smallest and largest sum

    def __post_init__(self) -> None:
        """Take memory for the scores of one tile."""
        pairs, group, time, self.width = self.queries.shape
        self.count = self.values.shape[1]
        self.rows = min(block_rows(group, self.window), time)
        columns = max(self.rows, min(COLUMNS, self.count))
        self.buffer = self.queries.new_empty(pairs * group * self.rows * columns)
        self.floor = NEGLIGIBLE[self.queries.dtype]
        if self.sums is not None:
            found = [torch.aminmax(part, dim=-1) for part in self.sums.split(COLUMNS, -1)]
            self.extremes = tuple(torch.stack(x, -1) for x in zip(*found, strict=True))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First row, and one past the last, of each block."""
        first, last = self.ahead, self.ahead + self.queries.shape[2]
        for a in range(first, last, self.rows):
            yield a, min(a + self.rows, last)

    def of_rows(self, a: int, b: int) -> slice:
        """Where these rows lie in tensors of the piece's rows."""
        return slice(a - self.ahead, b - self.ahead)

    def nearest(self, a: int, b: int) -> Tile:
        """The columns of rows a to b that are nearest to them: the diagonal's, or the last ones before all rows."""
        first, last = a, b
        if self.after:
            first, last = (self.count - 1) // COLUMNS * COLUMNS, self.count
        return Tile(first, last, True, self.sums is not None)

    def tiles(self, a: int, b: int, reference: Tensor) -> list[Tile]:
        """Tiles left of the nearest. What they leave out is negligible beside exp2(reference), [P, G, rows, 1]."""
        low, high = (0, 0) if self.window is None else (max(0, a - self.window + 1), max(0, b - self.window))
        if self.since is not None:
            earliest, latest = self._seen_from(a, a + 1), self._seen_from(b - 1, b)
            low, high = max(low, int(earliest.min())), max(high, int(latest.max()))
        end = self.nearest(a, b).first
        high = min(high, end)
        edges = {low, high, end, *range((low // COLUMNS + 1) * COLUMNS, end, COLUMNS)} if low < end else set()
        spans = list(pairwise(sorted(edges)))
        if self.sums is None:
            return [Tile(first, last, first < high, False) for first, last in spans]
        dropped, some = self._negligible(a, b, reference)
        return [
            Tile(first, last, first < high, some[first // COLUMNS])
            for first, last in spans
            if not dropped[first // COLUMNS]
        ]

    def _negligible(self, a: int, b: int, reference: Tensor) -> tuple[list[bool], list[bool]]:
        """Of each COLUMNS columns before row b: whether all weights are negligible, whether some may be."""
        start, gain = self._since_middle(a, b)
        gain, reach = gain - reference.squeeze(-1), self.reach[..., self.of_rows(a, b)]
        most = (gain + reach).amax(-1, keepdim=True)
        least = (gain - reach).amin(-1, keepdim=True)
        smallest, largest = (x[..., : (b - 1) // COLUMNS + 1] for x in self.extremes)
        dropped = (most + start - smallest < self.floor - 1).all(0).all(0)
        visible = (least + start - largest >= self.floor + 1).all(0).all(0)
        return dropped.tolist(), (~visible).tolist()

    def _since_middle(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """The sum at the column between rows a to b and the columns before them, and the rows' decay since then."""
        if not self.after:
            start = self.sums[..., a : a + 1]
            return start, self.sums[..., a:b] - start
        end = self.sums[..., -1:]
        gain = end - end  # zero, or NaN
        return end, gain.expand(-1, -1, b - a) if self.decay is None else gain + self.decay[..., self.of_rows(a, b)]

    def extended(self, a: int, b: int, low: int, high: int, reference: Tensor | float) -> Tensor:
        """Queries [P, G * rows, K + channels] whose products with keys `low` to `high` are scores less `reference`."""
        pairs, group = self.queries.shape[:2]
        rows = self.queries.new_empty((pairs, group, b - a, self.keys.shape[2]))
        rows[..., : self.width] = self.queries[:, :, self.of_rows(a, b)]
        rows[..., -1:] = -reference
        if self.sums is not None:
            rows[..., self.width : -1] = torch.eye(group, dtype=rows.dtype, device=rows.device)[:, None]
            start, gain = self._since_middle(a, b)
            rows[..., -1] += gain
            before = start - self.sums[..., low:high]
            # Where this is not finite the rows' own sums are not either, and the group's other heads may not see it.
            self.keys[:, low:high, self.width : -1] = before.nan_to_num_(0, 0, 0).mT
        elif self.decay is not None:
            rows[..., -1] += self.decay[..., self.of_rows(a, b)]
        return rows.flatten(1, 2)

    def scores(self, rows: Tensor, a: int, tile: Tile) -> Tensor:
        """x_ij less the rows' reference, [P, G * rows, columns], in the buffer; -inf where hidden."""
        first, last = tile.first, tile.last
        x = self._take(self.buffer, rows.shape[1], last - first)
        if self.softcap is None:
            torch.bmm(rows, self.keys[:, first:last].mT, out=x)
        else:
            torch.bmm(rows[..., : self.width], self.keys[:, first:last, : self.width].mT, out=x)
            self._cap(x).baddbmm_(rows[..., self.width :], self.keys[:, first:last, self.width :].mT)
        if tile.masked:
            b = a + rows.shape[1] // self.queries.shape[1]
            x.unflatten(1, (-1, b - a)).masked_fill_(self._hidden(a, b, first, last), NEVER)
        return x

    def near(self, a: int, b: int, reference: Tensor | None) -> Tensor:
        """The same for the nearest columns, with the reference [P, G, rows, 1] if there is one."""
        if not self.after:
            return self._diagonal(a, b, reference)
        tile = self.nearest(a, b)
        rows = self.extended(a, b, tile.first, tile.last, 0.0 if reference is None else reference)
        return self.scores(rows, a, tile)

    def _diagonal(self, a: int, b: int, reference: Tensor | None) -> Tensor:
        rows = self.queries[:, :, self.of_rows(a, b)].flatten(1, 2)
        keys = self.keys[:, a:b, : self.width].mT
        x = self._take(self.buffer, rows.shape[1], b - a)
        torch.bmm(rows, keys, out=x)
        if self.softcap is not None:
            self._cap(x)
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

    def _cap(self, x: Tensor) -> Tensor:
        """softcap tanh(x / softcap) in place; its derivative, 1 - tanh^2, is kept if there is memory for it."""
        x.div_(self.softcap).tanh_()
        if self.slopes is not None:
            torch.mul(x, x, out=self.slopes_of(x)).neg_().add_(1)
        return x.mul_(self.softcap)

    def slopes_of(self, x: Tensor) -> Tensor:
        """The derivatives of the tile's products, of which x is one."""
        return self._take(self.slopes, *x.shape[1:])

    def _take(self, buffer: Tensor, rows: int, columns: int) -> Tensor:
        pairs = self.queries.shape[0]
        return buffer[: pairs * rows * columns].view(pairs, rows, columns)

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
        if self.since is not None and bool((self._seen_from(b - 1, b) > first).any()):
            hidden = hidden | (column < self._seen_from(a, b)[..., None])
        return hidden

    def _seen_from(self, a: int, b: int) -> Tensor:
        """The first column that rows a to b see, for all that is forgotten."""
        return self.since[..., -1:] if self.after else self.since[..., a:b]


def prepare(c: Call | Prefill, piece: Piece) -> Run:
    """The run of a piece, in the dtype that is computed in."""
    (key_heads, key_width), dtype = c.k.shape[2:], state_dtype(c.q)
    queries = copied(query_heads(c.q, piece, piece.rows, key_heads), dtype).mul_(c.factor * LOG2E)
    keys, values = (x[piece.sequence, piece.columns, piece.heads][0].transpose(0, 1) for x in (c.k, c.v))
    (pairs, group), count = queries.shape[:2], keys.shape[1]
    wide = queries.new_empty((pairs, count, key_width + (1 if c.g is None else group + 1)))
    wide[..., :key_width] = keys
    wide[..., -1] = 1
    run = partial(
        Run,
        queries,
        wide,
        queries.new_empty((pairs, count, c.v.shape[3])).copy_(values),
        c.window_size,
        piece.ahead,
        c.place == AFTER,
        None if c.softcap is None else c.softcap * LOG2E,
    )
    fading = None if c.decay is None else of_heads(c.decay, piece, piece.rows, key_heads).to(dtype) * LOG2E
    if c.g is None:
        return run(decay=fading)
    sums, since = decay.sums(copied(of_heads(c.g, piece, piece.columns, key_heads), c.g.dtype))
    sums *= LOG2E
    longest = torch.linalg.vector_norm(wide[..., :key_width], dim=-1).amax(-1)
    reach = torch.linalg.vector_norm(queries, dim=-1).mul_(longest[:, None, None])
    return run(reach, sums, since, fading)


def of_heads(x: Tensor, piece: Piece, steps: slice, key_heads: int) -> Tensor:
    """The steps of a piece in x [B, T, HQ], [P, G, T]."""
    return query_heads(x[..., None], piece, steps, key_heads).squeeze(-1)
