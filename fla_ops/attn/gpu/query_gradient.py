"""The gradient of the queries: one program holds a block of rows and walks the columns that it sees."""

from __future__ import annotations

import triton
import triton.language as tl

from fla_ops.common.gpu.chunk_index import locate_chunk
from fla_ops.common.gpu.tiles import dot, load_rows, nearest, split_program, store_rows

from .scores import LOG2E, column_range, load_faded, locate_other, rows_ahead, tile_scores

EVER = tl.constexpr(float("inf"))  # as a row's log-sum-exp: nothing has weight


@triton.jit
def differentiate_rows(
    queries, dout, logs, delta, k, v,       # [BM, BK], [BM, BV], [BM] x 2, at this head: [time, H, K], [time, H, V]
    high, low, since, faded,                # at this head and sequence x 3, [BM]; or None
    dq, drow,                               # [BM, BK], [BM]
    begin, row, start, end, length, window, scale, softcap,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, DIAGONAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, PLACE: tl.constexpr,
):
    """Take in the columns from start to end."""
    rows = row + tl.arange(0, BM)
    for column in range(start, end, BN):
        columns = column + tl.arange(0, BN)
        keys = load_rows(k, begin + column, length - column, 0, H, K, BN, BK)
        x, slope = tile_scores(
            queries, keys, high, low, since, faded, rows, columns, row, length, window, scale, softcap,
            MASKED, DIAGONAL, WINDOW, PRECISION, PLACE,
        )
        values = load_rows(v, begin + column, length - column, 0, H, V, BN, BV)
        dweights = dot(dout, tl.trans(values), PRECISION)
        dx = tl.exp2(x - logs[:, None]) * (dweights - delta[:, None])
        drow += tl.sum(dx, 1)
        if softcap is not None:
            dx *= slope
        dq += dot(nearest(dx, keys.dtype), keys, PRECISION)
    return dq, drow


@triton.jit(do_not_specialize=["T", "TK", "N", "TOTAL", "ROWS", "window", "gap"])
def attn_query_gradient_kernel(
    q, k, v, do,                            # [B, T, HQ, K], [B, TK, H, K], [B, TK, H, V], [B, T, HQ, V]
    high, low, since, decay, logs, delta,   # [HQ, TOTAL] x 3, [B, T, HQ], [HQ, ROWS] x 2
    dq, drow, ddecay,                       # [B, T, HQ, K], [HQ, TOTAL] unless rows are after all, [B, T, HQ]
    cu_seqlens, cu_seqlens_k, chunk_sequence, chunk_ends, # [N + 1] x 2, [rows], [N]
    ROWS, scale, softcap, T, TK, N, TOTAL, window, gap,
    HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, PLACE: tl.constexpr,
):
    block, head, _ = split_program(1, HQ)
    block = tl.num_programs(0) // HQ - 1 - block  # late rows see most: begin with them
    begin, time, i = locate_chunk(block, cu_seqlens, chunk_sequence, chunk_ends, T, N, BM)
    first = i * BM
    if first >= time:
        return
    begin_k, length = locate_other(block, begin, time, cu_seqlens_k, chunk_sequence, T, TK, BM, PLACE)
    ahead = rows_ahead(time, length, gap, PLACE)
    base = head.to(tl.int64) * ROWS + begin
    base_k = head.to(tl.int64) * TOTAL + begin_k
    k += head // (HQ // H) * K
    v += head // (HQ // H) * V
    if high is not None:
        high += base_k
        low += base_k
        since += base_k
    if decay is not None:
        decay += head
    rows = first + tl.arange(0, BM)
    queries = load_rows(q + head * K, begin + first, time - first, 0, HQ, K, BM, BK)
    dout = load_rows(do + head * V, begin + first, time - first, 0, HQ, V, BM, BV)
    faded = load_faded(decay, begin + first, time - first, HQ, BM)
    log = tl.load(logs + base + rows, mask=rows < time, other=EVER)
    offset = tl.load(delta + base + rows, mask=rows < time, other=0.0)
    found = tl.zeros([BM, BK], tl.float32)
    along = tl.zeros([BM], tl.float32)
    row = first + ahead
    end = tl.minimum(row + BM, time + ahead)
    start, whole, edge, stop = column_range(since, row, end, length, window, WINDOW, PLACE, BN)
    if WINDOW or since is not None:
        found, along = differentiate_rows(
            queries, dout, log, offset, k, v, high, low, since, faded, found, along,
            begin_k, row, start, whole, length, window, scale * LOG2E, softcap,
            H, K, V, BM, BN, BK, BV, True, False, WINDOW, PRECISION, PLACE,
        )
    found, along = differentiate_rows(
        queries, dout, log, offset, k, v, high, low, since, faded, found, along,
        begin_k, row, whole, edge, length, window, scale * LOG2E, softcap,
        H, K, V, BM, BN, BK, BV, False, False, WINDOW, PRECISION, PLACE,
    )
    found, along = differentiate_rows(
        queries, dout, log, offset, k, v, high, low, since, faded, found, along,
        begin_k, row, edge, stop, length, window, scale * LOG2E, softcap,
        H, K, V, BM, BN, BK, BV, True, True, WINDOW, PRECISION, PLACE,
    )
    if dq is not None:
        store_rows(dq + head * K, found * scale, begin + first, time - first, 0, HQ, K, BM, BK)
    if drow is not None:
        tl.store(drow + base_k + ahead + rows, along, mask=(rows < time) & (ahead + rows >= 0))
    if ddecay is not None:
        at = (begin + rows) * HQ + head
        tl.store(ddecay + at, nearest(along, ddecay.dtype.element_ty), mask=rows < time)
