"""The gradient of the queries: one program holds a block of rows and walks the columns that it sees."""

from __future__ import annotations

import triton
import triton.language as tl

from fla_ops.common.gpu.chunk_index import locate_chunk
from fla_ops.common.gpu.tiles import dot, load_rows, nearest, split_program, store_rows

from .decay import LOG2E
from .scores import column_range, tile_scores

EVER = tl.constexpr(float("inf"))  # as a row's log-sum-exp: nothing has weight


@triton.jit
def differentiate_rows(
    queries, dout, logs, delta, k, v,       # [BM, BK], [BM, BV], [BM] x 2, at this head: [time, H, K], [time, H, V]
    high, low, since,                       # at this head and sequence, or None
    dq, drow,                               # [BM, BK], [BM]
    begin, row, start, end, length, window, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, DIAGONAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):
    """Take in the columns from start to end."""
    rows = row + tl.arange(0, BM)
    for column in range(start, end, BN):
        columns = column + tl.arange(0, BN)
        keys = load_rows(k, begin + column, length - column, 0, H, K, BN, BK)
        x = tile_scores(
            queries, keys, high, low, since, rows, columns, row, length, window, scale,
            MASKED, DIAGONAL, WINDOW, PRECISION,
        )
        values = load_rows(v, begin + column, length - column, 0, H, V, BN, BV)
        dweights = dot(dout, tl.trans(values), PRECISION)
        dx = tl.exp2(x - logs[:, None]) * (dweights - delta[:, None])
        drow += tl.sum(dx, 1)
        dq += dot(nearest(dx, keys.dtype), keys, PRECISION)
    return dq, drow


@triton.jit(do_not_specialize=["T", "N", "TOTAL", "window"])
def attn_query_gradient_kernel(
    q, k, v, do,                            # [B, T, HQ, K], [B, T, H, K], [B, T, H, V], [B, T, HQ, V]
    high, low, since, logs, delta,          # [HQ, TOTAL] x 5
    dq, drow,                               # [B, T, HQ, K], [HQ, TOTAL]
    cu_seqlens, chunk_sequence, chunk_ends, # [N + 1], [rows], [N]
    scale, T, N, TOTAL, window,
    HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):
    block, head, _ = split_program(1, HQ)
    block = tl.num_programs(0) // HQ - 1 - block  # late rows see most: begin with them
    begin, length, i = locate_chunk(block, cu_seqlens, chunk_sequence, chunk_ends, T, N, BM)
    row = i * BM
    if row >= length:
        return
    base = head.to(tl.int64) * TOTAL + begin
    k += head // (HQ // H) * K
    v += head // (HQ // H) * V
    if high is not None:
        high += base
        low += base
        since += base
    rows = row + tl.arange(0, BM)
    queries = load_rows(q + head * K, begin + row, length - row, 0, HQ, K, BM, BK)
    dout = load_rows(do + head * V, begin + row, length - row, 0, HQ, V, BM, BV)
    log = tl.load(logs + base + rows, mask=rows < length, other=EVER)
    offset = tl.load(delta + base + rows, mask=rows < length, other=0.0)
    found = tl.zeros([BM, BK], tl.float32)
    along = tl.zeros([BM], tl.float32)
    end = tl.minimum(row + BM, length)
    start, whole = column_range(since, row, length, window, WINDOW, BM, BN)
    if WINDOW or since is not None:
        found, along = differentiate_rows(
            queries, dout, log, offset, k, v, high, low, since, found, along, begin, row, start, whole, length, window,
            scale * LOG2E, H, K, V, BM, BN, BK, BV, True, False, WINDOW, PRECISION,
        )
    found, along = differentiate_rows(
        queries, dout, log, offset, k, v, high, low, since, found, along, begin, row, whole, row, length, window,
        scale * LOG2E, H, K, V, BM, BN, BK, BV, False, False, WINDOW, PRECISION,
    )
    found, along = differentiate_rows(
        queries, dout, log, offset, k, v, high, low, since, found, along, begin, row, row, end, length, window,
        scale * LOG2E, H, K, V, BM, BN, BK, BV, True, True, WINDOW, PRECISION,
    )
    if dq is not None:
        store_rows(dq + head * K, found * scale, begin + row, length - row, 0, HQ, K, BM, BK)
    if drow is not None:
        tl.store(drow + base + rows, along, mask=rows < length)
