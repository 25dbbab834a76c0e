"""Scores of one tile and the part of a sequence that a block sees, as device functions. Logarithms are to base two.

Rows and columns are numbered by where they lie in their sequence's keys. PLACE says where rows lie: "same", they are
the keys' steps; "last", they are the last of these; "after", they come after all of them, and decay further.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_ops.common.gpu.chunk_index import sequence_bounds, sequence_of
from fla_ops.common.gpu.tiles import dot

NEVER = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate_other(
    block, start, length,                   # of the sequence whose block of rows, or of columns, this is
    cu_seqlens, chunk_sequence, T, OTHER,   # offsets of the other side's steps, and how many steps both sides have
    BLOCK: tl.constexpr, PLACE: tl.constexpr,
):
    """Where the sequence begins on the other side (int64), and its length there."""
    if PLACE != "same":
        start, length = sequence_bounds(sequence_of(block, chunk_sequence, T, BLOCK), cu_seqlens, OTHER)
    return start, length


@triton.jit
def rows_ahead(rows, columns, gap, PLACE: tl.constexpr):
    """Where the first row of a sequence lies among its columns, from its numbers of both."""
    if PLACE == "same":
        ahead = rows * 0
    elif PLACE == "last":
        ahead = columns - rows
    else:
        ahead = columns + gap
    return ahead


@triton.jit
def load_faded(decay, first, steps, HQ: tl.constexpr, BM: tl.constexpr):
    """The further decay of a block of rows, [BM], from `decay` at a head of [rows, HQ]; None without."""
    if decay is not None:
        t = tl.arange(0, BM)
        return tl.load(decay + (first + t) * HQ, mask=t < steps, other=0.0).to(tl.float32) * LOG2E
    else:
        return None


@triton.jit
def capped(x, softcap):
    """softcap tanh(x / softcap), for x in powers of two and softcap as it is, and its derivative."""
    limit = softcap * LOG2E
    u = x / limit
    small = tl.exp2(tl.abs(u) * (-2 * LOG2E))
    far = (1 - small) / (1 + small)
    square = u * u  # near zero the difference above has few digits
    near = 1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))
    share = tl.where(tl.abs(u) < 0.25, u * near, tl.where(u < 0, -far, far))
    return share * limit, 1 - share * share


@triton.jit
def decay_difference(
    high, low, rows, columns, row, length, DIAGONAL: tl.constexpr, ACROSS: tl.constexpr, PLACE: tl.constexpr
):
    """G_i - G_j for steps `rows` [BM] and `columns` [BN] of a sequence; `high` and `low` at its first step.

    Off the diagonal no column is after `row`, the first of the rows: then the difference is a sum of two parts that do
    not cancel. Rows after all columns have the last one's sum.
    """
    in_columns = columns < length
    column_high = tl.load(high + columns, mask=in_columns, other=0.0)
    column_low = tl.load(low + columns, mask=in_columns, other=0.0)
    if PLACE == "after":
        before = (tl.load(high + length - 1) - column_high) + (tl.load(low + length - 1) - column_low)
        difference = tl.expand_dims(before, 1 - ACROSS)
    else:
        in_rows = (rows < length) if PLACE == "same" else (rows < length) & (rows >= 0)
        row_high = tl.load(high + rows, mask=in_rows, other=0.0)
        row_low = tl.load(low + rows, mask=in_rows, other=0.0)
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
    high, low, since, faded,            # at this head and sequence x 3, the rows' further decay [BM]; or None
    rows, columns, row, length, window, scale, softcap,
    MASKED: tl.constexpr, DIAGONAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, PLACE: tl.constexpr,
    ACROSS: tl.constexpr = 1,
):
    """x_ij, -inf where row i does not see column j: [BM, BN], or [BN, BM] with ACROSS = 0; and the derivative of what
    caps the products, or 1.
    """
    if ACROSS == 1:
        x = dot(queries, tl.trans(keys), PRECISION) * scale
    else:
        x = dot(keys, tl.trans(queries), PRECISION) * scale
    slope = 1.0
    if softcap is not None:
        x, slope = capped(x, softcap)
    if high is not None:
        x += decay_difference(high, low, rows, columns, row, length, DIAGONAL, ACROSS, PLACE)
    if faded is not None:
        x += tl.expand_dims(faded, ACROSS)
    if MASKED:
        column, i = tl.expand_dims(columns, 1 - ACROSS), tl.expand_dims(rows, ACROSS)
        seen = column < length if PLACE == "after" else column <= i
        if WINDOW:
            seen &= column > i - window
        if since is not None:
            if PLACE == "after":
                seen &= column >= tl.load(since + length - 1)
            else:
                in_rows = (rows < length) if PLACE == "same" else (rows < length) & (rows >= 0)
                seen &= column >= tl.expand_dims(tl.load(since + rows, mask=in_rows, other=0), ACROSS)
        x = tl.where(seen, x, NEVER)
    return x, slope


@triton.jit
def first_seen(since, row, length, window, WINDOW: tl.constexpr, PLACE: tl.constexpr):
    """The first column that a row sees."""
    first = row * 0
    if WINDOW:
        first = tl.maximum(first, row - window + 1)
    if since is not None:
        if PLACE == "same":
            forgotten = tl.load(since + row)
        else:  # of a row outside, that nearest to it; there may be none
            forgotten = tl.load(since + tl.minimum(tl.maximum(row, 0), length - 1), mask=length > 0, other=0)
        first = tl.maximum(first, forgotten)
    return first


@triton.jit
def last_seeing(until, column, length, end, window, WINDOW: tl.constexpr, PLACE: tl.constexpr):
    """One past the last row that sees a column, of rows up to `end`."""
    last = end
    if WINDOW:
        last = tl.minimum(last, column + window)
    if until is not None:
        forgotten = tl.load(until + column)
        # Rows after all columns see one that none of these has forgotten.
        last = tl.where(forgotten < length, 0, last) if PLACE == "after" else tl.minimum(last, forgotten)
    return last


@triton.jit
def column_range(
    since, row, end, length, window,
    WINDOW: tl.constexpr, PLACE: tl.constexpr, BN: tl.constexpr,
):
    """For rows from `row` to `end`, in multiples of BN but for the last: where the columns start that some row sees,
    where those that all see, where these end, and where all end.
    """
    if PLACE == "same":
        edge, stop = row, end
    elif PLACE == "last":
        edge, stop = tl.maximum(row, 0) // BN * BN, end
    else:
        edge, stop = length // BN * BN, length
    start, whole = row * 0, row * 0
    if WINDOW or since is not None:
        start = first_seen(since, row, length, window, WINDOW, PLACE) // BN * BN
        whole = tl.cdiv(first_seen(since, end - 1, length, window, WINDOW, PLACE), BN) * BN
        if PLACE == "after":  # all columns may be out of sight
            stop = tl.where(start < length, length, 0)
    return start, tl.minimum(whole, edge), edge, stop
