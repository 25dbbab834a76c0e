"""The gradients of keys and values: one program holds a block of columns and walks the rows that see it.

It goes through the query heads of its group one after the other, so their sum needs neither atomics nor memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_ops.common.gpu.chunk_index import locate_chunk
from fla_ops.common.gpu.tiles import dot, load_rows, nearest, split_program, store_rows

from .decay import LOG2E
from .scores import last_seeing, tile_scores

EVER = tl.constexpr(float("inf"))  # as a row's log-sum-exp: nothing has weight


@triton.jit
def differentiate_columns(
    keys, values, q, do,                    # [BN, BK], [BN, BV], at this head: [time, HQ, K], [time, HQ, V]
    high, low, since, logs, delta,          # at this head and sequence
    dk, dv, dcolumn,                        # [BN, BK], [BN, BV], [BN]
    begin, column, start, end, length, window, scale,
    HQ: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr,
):
    """Take in the rows from start to end."""
    columns = column + tl.arange(0, BN)
    for row in range(start, end, BM):
        rows = row + tl.arange(0, BM)
        queries = load_rows(q, begin + row, length - row, 0, HQ, K, BM, BK)
        x = tile_scores(  # [BN, BM]: as it is, the left operand of the products below
            queries, keys, high, low, since, rows, columns, row, length, window, scale,
            MASKED, MASKED, WINDOW, PRECISION, 0,
        )
        log = tl.load(logs + rows, mask=rows < length, other=EVER)
        weights = tl.exp2(x - log[None, :])
        dout = load_rows(do, begin + row, length - row, 0, HQ, V, BM, BV)
        if NEED_V:
            dv += dot(nearest(weights, dout.dtype), dout, PRECISION)
        if NEED_K:
            offset = tl.load(delta + rows, mask=rows < length, other=0.0)
            dx = weights * (dot(values, tl.trans(dout), PRECISION) - offset[None, :])
            dcolumn += tl.sum(dx, 1)
            dk += dot(nearest(dx, queries.dtype), queries, PRECISION)
    return dk, dv, dcolumn


@triton.jit(do_not_specialize=["T", "N", "TOTAL", "window"])
def attn_key_gradient_kernel(
    q, k, v, do,                            # [B, T, HQ, K], [B, T, H, K], [B, T, H, V], [B, T, HQ, V]
    high, low, since, until, logs, delta,   # [HQ, TOTAL] x 6
    dk, dv, dcolumn,                        # [B, T, H, K], [B, T, H, V], [HQ, TOTAL]
    cu_seqlens, chunk_sequence, chunk_ends, # [N + 1], [rows], [N]
    scale, T, N, TOTAL, window,
    HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
):
    block, key_head, _ = split_program(1, H)
    begin, length, i = locate_chunk(block, cu_seqlens, chunk_sequence, chunk_ends, T, N, BN)
    column = i * BN
    if column >= length:
        return
    keys = load_rows(k + key_head * K, begin + column, length - column, 0, H, K, BN, BK)
    values = load_rows(v + key_head * V, begin + column, length - column, 0, H, V, BN, BV)
    dkeys = tl.zeros([BN, BK], tl.float32)
    dvalues = tl.zeros([BN, BV], tl.float32)
    last = tl.minimum(column + BN, length) - 1
    for member in range(HQ // H):
        head = key_head * (HQ // H) + member
        base = head.to(tl.int64) * TOTAL + begin
        at_q, at_do = q + head * K, do + head * V
        if high is not None:
            highs, lows, sinces, untils = high + base, low + base, since + base, until + base
        else:
            highs, lows, sinces, untils = None, None, None, None
        below = column + tl.cdiv(BN, BM) * BM
        end = last_seeing(untils, last, length, window, WINDOW)
        whole = below + tl.maximum(last_seeing(untils, column, length, window, WINDOW) - below, 0) // BM * BM
        along = tl.zeros([BN], tl.float32)
        for part in range(2):  # rows that see some of the columns: on the diagonal, and where these pass out of sight
            start = tl.where(part == 0, column, whole)
            stop = tl.where(part == 0, tl.minimum(below, end), end)
            dkeys, dvalues, along = differentiate_columns(
                keys, values, at_q, at_do, highs, lows, sinces, logs + base, delta + base, dkeys, dvalues, along,
                begin, column, start, stop, length, window, scale * LOG2E,
                HQ, K, V, BM, BN, BK, BV, True, WINDOW, PRECISION, NEED_K, NEED_V,
            )
        dkeys, dvalues, along = differentiate_columns(
            keys, values, at_q, at_do, highs, lows, sinces, logs + base, delta + base, dkeys, dvalues, along,
            begin, column, below, whole, length, window, scale * LOG2E,
            HQ, K, V, BM, BN, BK, BV, False, WINDOW, PRECISION, NEED_K, NEED_V,
        )
        if dcolumn is not None:
            columns = column + tl.arange(0, BN)
            tl.store(dcolumn + base + columns, along, mask=columns < length)
    if dk is not None:
        store_rows(dk + key_head * K, dkeys * scale, begin + column, length - column, 0, H, K, BN, BK)
    if dv is not None:
        store_rows(dv + key_head * V, dvalues, begin + column, length - column, 0, H, V, BN, BV)
