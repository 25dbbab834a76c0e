"""Scores of one tile and the part of a sequence that a block sees, as device functions. Logarithms are to base two."""

from __future__ import annotations

import triton
import triton.language as tl

from fla_ops.common.gpu.tiles import dot

NEVER = tl.constexpr(float("-inf"))


@triton.jit
def decay_difference(high, low, rows, columns, row, length, DIAGONAL: tl.constexpr, ACROSS: tl.constexpr):
    """G_i - G_j for steps `rows` [BM] and `columns` [BN] of a sequence; `high` and `low` at its first step.

    Off the diagonal no column is after `row`, the first of the rows: then the difference is a sum of two parts that do
    not cancel.
    """
    in_rows, in_columns = rows < length, columns < length
    row_high = tl.load(high + rows, mask=in_rows, other=0.0)
    row_low = tl.load(low + rows, mask=in_rows, other=0.0)
    column_high = tl.load(high + columns, mask=in_columns, other=0.0)
    column_low = tl.load(low + columns, mask=in_columns, other=0.0)
    if DIAGONAL:
        difference = tl.expand_dims(row_high, ACROSS) - tl.expand_dims(column_high, 1 - ACROSS)
        difference += tl.expand_dims(row_low, ACROSS) - tl.expand_dims(column_low, 1 - ACROSS)
    else:
        middle_high, middle_low = tl.load(high + row), tl.load(low + row)
        after = (row_high - middle_high) + (row_low - middle_low)
        before = (middle_high - column_high) + (middle_low - column_low)
        difference = tl.expand_dims(after, ACROSS) + tl.expand_dims(before, 1 - ACROSS)
    return difference


@triton.jit
def tile_scores(
    queries, keys,                      # [BM, BK], [BN, BK]
    high, low, since,                   # at this head and sequence, or None
    rows, columns, row, length, window, scale,
    MASKED: tl.constexpr, DIAGONAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    ACROSS: tl.constexpr = 1,
):
    """x_ij, -inf where row i does not see column j: [BM, BN], or [BN, BM] with ACROSS = 0."""
    if ACROSS == 1:
        x = dot(queries, tl.trans(keys), PRECISION) * scale
    else:
        x = dot(keys, tl.trans(queries), PRECISION) * scale
    if high is not None:
        x += decay_difference(high, low, rows, columns, row, length, DIAGONAL, ACROSS)
    if MASKED:
        column, i = tl.expand_dims(columns, 1 - ACROSS), tl.expand_dims(rows, ACROSS)
        seen = column <= i
        if WINDOW:
            seen &= column > i - window
        if since is not None:
            first = tl.load(since + rows, mask=rows < length, other=0)
            seen &= column >= tl.expand_dims(first, ACROSS)
        x = tl.where(seen, x, NEVER)
    return x


@triton.jit
def first_seen(since, row, window, WINDOW: tl.constexpr):
    """The first column that a row sees."""
    first = row * 0
    if WINDOW:
        first = tl.maximum(first, row - window + 1)
    if since is not None:
        first = tl.maximum(first, tl.load(since + row))
    return first


@triton.jit
def last_seeing(until, column, length, window, WINDOW: tl.constexpr):
    """One past the last row that sees a column."""
    last = length
    if WINDOW:
        last = tl.minimum(last, column + window)
    if until is not None:
        last = tl.minimum(last, tl.load(until + column))
    return last


@triton.jit
def column_range(since, row, length, window, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Where, for rows from `row`, the tiles of columns start: that some row sees, and that all see up to `row`."""
    start, whole = row * 0, row * 0
    if WINDOW or since is not None:
        start = first_seen(since, row, window, WINDOW) // BN * BN
        whole = tl.cdiv(first_seen(since, tl.minimum(row + BM, length) - 1, window, WINDOW), BN) * BN
    return start, tl.minimum(whole, row)
