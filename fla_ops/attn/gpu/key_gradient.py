"""The gradients of keys and values: one program holds a block of columns and walks the rows that see it.

It goes through the query heads of its group one after the other, so their sum needs neither atomics nor memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_ops.common.gpu.chunk_index import locate_chunk
from fla_ops.common.gpu.tiles import dot, load_rows, nearest, split_program, store_rows

from .scores import LOG2E, last_seeing, load_faded, locate_other, rows_ahead, tile_scores

EVER = tl.constexpr(float("inf"))  # as a row's log-sum-exp: nothing has weight


@triton.jit
def differentiate_columns(
    keys, values, q, do,                    # [BN, BK], [BN, BV], at this head: [time, HQ, K], [time, HQ, V]
    high, low, since, decay, logs, delta,   # at this head and sequence x 3, at this head, at both x 2
    dk, dv, dcolumn,                        # [BN, BK], [BN, BV], [BN]
    begin, column, start, end, time, ahead, length, window, scale, softcap,
    HQ: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, PLACE: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr,
):
    """Take in the rows from start to end."""
    columns = column + tl.arange(0, BN)
    for row in range(start, end, BM):
        rows = row + tl.arange(0, BM)
        queries = load_rows(q, begin + row, time - row, 0, HQ, K, BM, BK)
        faded = load_faded(decay, begin + row, time - row, HQ, BM)
        x, slope = tile_scores(  # [BN, BM]: as it is, the left operand of the products below
            queries, keys, high, low, since, faded, ahead + rows, columns, ahead + row, length, window, scale, softcap,
            MASKED, MASKED, WINDOW, PRECISION, PLACE, 0,
        )
        log = tl.load(logs + rows, mask=rows < time, other=EVER)
        weights = tl.exp2(x - log[None, :])
        dout = load_rows(do, begin + row, time - row, 0, HQ, V, BM, BV)
        if NEED_V:
            dv += dot(nearest(weights, dout.dtype), dout, PRECISION)
        if NEED_K:
            offset = tl.load(delta + rows, mask=rows < time, other=0.0)
            dx = weights * (dot(values, tl.trans(dout), PRECISION) - offset[None, :])
            dcolumn += tl.sum(dx, 1)
            if softcap is not None:
                dx *= slope
            dk += dot(nearest(dx, queries.dtype), queries, PRECISION)
    return dk, dv, dcolumn


@triton.jit(do_not_specialize=["T", "TK", "N", "TOTAL", "ROWS", "window", "gap"])
def attn_key_gradient_kernel(
    q, k, v, do,                            # [B, T, HQ, K], [B, TK, H, K], [B, TK, H, V], [B, T, HQ, V]
    high, low, since, until,                # [HQ, TOTAL] x 4
    decay, logs, delta,                     # [B, T, HQ], [HQ, ROWS] x 2
    dk, dv, dcolumn,                        # [B, TK, H, K], [B, TK, H, V], [HQ, TOTAL]
    cu_seqlens, cu_seqlens_k, chunk_sequence, chunk_ends, # [N + 1] x 2, [rows], [N]
    ROWS, scale, softcap, T, TK, N, TOTAL, window, gap,
    HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, PLACE: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
):
    block, key_head, _ = split_program(1, H)
    if PLACE == "same":
        begin_k, length, i = locate_chunk(block, cu_seqlens, chunk_sequence, chunk_ends, T, N, BN)
    else:
        begin_k, length, i = locate_chunk(block, cu_seqlens_k, chunk_sequence, chunk_ends, TK, N, BN)
    column = i * BN
    if column >= length:
        return
    begin, time = locate_other(block, begin_k, length, cu_seqlens, chunk_sequence, TK, T, BN, PLACE)
    ahead = rows_ahead(time, length, gap, PLACE)
    keys = load_rows(k + key_head * K, begin_k + column, length - column, 0, H, K, BN, BK)
    values = load_rows(v + key_head * V, begin_k + column, length - column, 0, H, V, BN, BV)
    dkeys = tl.zeros([BN, BK], tl.float32)
    dvalues = tl.zeros([BN, BV], tl.float32)
    last = tl.minimum(column + BN, length) - 1
    nearest_row = tl.maximum(column - ahead, 0)  # from which on rows see some of the columns, and some steps on, all
    below = nearest_row + tl.cdiv(tl.maximum(column + BN - ahead - nearest_row, 0), BM) * BM
    for member in range(HQ // H):
        head = key_head * (HQ // H) + member
        base = head.to(tl.int64) * ROWS + begin
        base_k = head.to(tl.int64) * TOTAL + begin_k
        at_q, at_do = q + head * K, do + head * V
        if high is not None:
            highs, lows, sinces, untils = high + base_k, low + base_k, since + base_k, until + base_k
        else:
            highs, lows, sinces, untils = None, None, None, None
        decays = None
        if decay is not None:
            decays = decay + head
        end = last_seeing(untils, last, length, ahead + time, window, WINDOW, PLACE) - ahead
        seen_by_all = last_seeing(untils, column, length, ahead + time, window, WINDOW, PLACE) - ahead
        whole = below + tl.maximum(seen_by_all - below, 0) // BM * BM
        along = tl.zeros([BN], tl.float32)
        for part in range(2):  # rows that see some of the columns: on the diagonal, and where these pass out of sight
            start = tl.where(part == 0, nearest_row, whole)
            stop = tl.where(part == 0, tl.minimum(below, end), end)
            dkeys, dvalues, along = differentiate_columns(
                keys, values, at_q, at_do, highs, lows, sinces, decays, logs + base, delta + base,
                dkeys, dvalues, along, begin, column, start, stop, time, ahead, length, window, scale * LOG2E, softcap,
                HQ, K, V, BM, BN, BK, BV, True, WINDOW, PRECISION, PLACE, NEED_K, NEED_V,
            )
        dkeys, dvalues, along = differentiate_columns(
            keys, values, at_q, at_do, highs, lows, sinces, decays, logs + base, delta + base,
            dkeys, dvalues, along, begin, column, below, whole, time, ahead, length, window, scale * LOG2E, softcap,
            HQ, K, V, BM, BN, BK, BV, False, WINDOW, PRECISION, PLACE, NEED_K, NEED_V,
        )
        if dcolumn is not None:
            columns = column + tl.arange(0, BN)
            tl.store(dcolumn + base_k + columns, along, mask=columns < length)
    if dk is not None:
        store_rows(dk + key_head * K, dkeys * scale, begin_k + column, length - column, 0, H, K, BN, BK)
    if dv is not None:
        store_rows(dv + key_head * V, dvalues, begin_k + column, length - column, 0, H, V, BN, BV)
