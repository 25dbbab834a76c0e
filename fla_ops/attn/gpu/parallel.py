"""The parallel and the rectangular form, forward: one program holds a block of rows and walks the columns it sees.

The softmax is taken as the columns come: with m the largest score so far, l = sum_j exp2(x_ij - m) and out = sum_j
exp2(x_ij - m) v_j are rescaled when m grows. No T x T matrix is formed. Columns outside the window, or before a step
that forgets, are not visited.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import contiguous, packed_sequences, refuse_float64
from fla_ops.common.gpu.chunk_index import locate_chunk
from fla_ops.common.gpu.tiles import dot, load_rows, nearest, split_program, store_rows

from .. import checks, outputs
from ..call import RESIDUAL_SCALE, SAME, Call, Decoding, Outputs, Prefill
from .decay import decay_sums
from .scores import LOG2E, NEVER, column_range, load_faded, locate_other, rows_ahead, tile_scores

REST = tl.constexpr(RESIDUAL_SCALE)
WIDEST = 256  # K and V: a program holds whole rows


@triton.jit
def attend(
    queries, k, v,                          # [BM, BK], at this head: [time, H, K], [time, H, V]
    high, low, since, faded,                # at this head and sequence x 3, [BM]; or None
    out, total, peak,                       # [BM, BV], [BM], [BM]
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
        x, _ = tile_scores(
            queries, keys, high, low, since, faded, rows, columns, row, length, window, scale, softcap,
            MASKED, DIAGONAL, WINDOW, PRECISION, PLACE,
        )
        largest = tl.maximum(peak, tl.max(x, 1))
        weights = tl.exp2(x - largest[:, None])
        shrink = tl.exp2(peak - largest)
        values = load_rows(v, begin + column, length - column, 0, H, V, BN, BV)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + dot(nearest(weights, values.dtype), values, PRECISION)
        peak = largest
    return out, total, peak


@triton.jit(do_not_specialize=["T", "TK", "N", "TOTAL", "window", "gap"])
def attn_forward_kernel(
    q, k, v,                                # [B, T, HQ, K], [B, TK, H, K], [B, TK, H, V]
    high, low, since, decay, sink_bias,     # [HQ, TOTAL] x 3, [B, T, HQ], [HQ]
    o, rest, lse,                           # [B, T, HQ, V] x 2, [B, T, HQ]
    cu_seqlens, cu_seqlens_k, chunk_sequence, chunk_ends, # [N + 1] x 2, [rows], [N]
    scale, softcap, T, TK, N, TOTAL, window, gap,
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
    q += head * K
    k += head // (HQ // H) * K
    v += head // (HQ // H) * V
    if high is not None:
        high += head.to(tl.int64) * TOTAL + begin_k
        low += head.to(tl.int64) * TOTAL + begin_k
        since += head.to(tl.int64) * TOTAL + begin_k
    if decay is not None:
        decay += head

    queries = load_rows(q, begin + first, time - first, 0, HQ, K, BM, BK)
    faded = load_faded(decay, begin + first, time - first, HQ, BM)
    out = tl.zeros([BM, BV], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], -1e38, tl.float32)  # finite: where nothing is seen yet, -inf - -inf would be NaN
    row = first + ahead
    end = tl.minimum(row + BM, time + ahead)
    start, whole, edge, stop = column_range(since, row, end, length, window, WINDOW, PLACE, BN)
    if WINDOW or since is not None:
        out, total, peak = attend(
            queries, k, v, high, low, since, faded, out, total, peak,
            begin_k, row, start, whole, length, window, scale, softcap,
            H, K, V, BM, BN, BK, BV, True, False, WINDOW, PRECISION, PLACE,
        )
    out, total, peak = attend(
        queries, k, v, high, low, since, faded, out, total, peak,
        begin_k, row, whole, edge, length, window, scale, softcap,
        H, K, V, BM, BN, BK, BV, False, False, WINDOW, PRECISION, PLACE,
    )
    out, total, peak = attend(
        queries, k, v, high, low, since, faded, out, total, peak,
        begin_k, row, edge, stop, length, window, scale, softcap,
        H, K, V, BM, BN, BK, BV, True, True, WINDOW, PRECISION, PLACE,
    )
    if sink_bias is not None:
        sink = tl.load(sink_bias + head).to(tl.float32) * LOG2E
        largest = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - largest)
        total = total * shrink + tl.exp2(sink - largest)
        out = out * shrink[:, None]
        peak = largest
    if PLACE != "same":  # a row may see nothing
        peak = tl.where(total == 0.0, NEVER, peak)
        total = tl.where(total == 0.0, 1.0, total)
    out = out / total[:, None]
    store_rows(o + head * V, out, begin + first, time - first, 0, HQ, V, BM, BV)
    if rest is not None:
        left = out - nearest(out, o.dtype.element_ty).to(tl.float32)
        store_rows(rest + head * V, left * REST, begin + first, time - first, 0, HQ, V, BM, BV)
    rows = first + tl.arange(0, BM)
    tl.store(lse + (begin + rows) * HQ + head, (peak + tl.log2(total)) / LOG2E, mask=rows < time)


def forward(c: Call) -> Outputs:
    """Every row's output and the logarithm of its denominator, and o's rounding residual if that is asked for."""
    checks.eager(c)
    return _forward(c)


def prefill(c: Prefill) -> Outputs:
    """The same for queries at later steps than most of their keys."""
    checks.eager_prefill(c)
    return _forward(c)


def _forward(c: Call | Prefill) -> Outputs:
    refuse_float64(c.q)
    refuse_widths(c)
    if c.window_size == 0:
        return outputs.without_keys(c)
    c = contiguous(c)
    found = outputs.empty(c)
    entry = launch.entry("attn_forward", c.q, c.q.shape[3], c.v.shape[3])
    index = chunk_index.build(*c.q.shape[:2], c.cu_seqlens, entry["BM"])
    sizes, settings = shared(c)
    launch.run(
        attn_forward_kernel,
        index.rows * c.q.shape[2],
        c.q, c.k, c.v, *decay_sums(c)[:3], c.decay, c.sink_bias, found.o, found.rest, found.lse,
        *offsets(c), index.sequence, index.ends, c.factor * LOG2E.value, *sizes,
        **settings, BM=index.size, BN=entry["BN"], PRECISION=launch.precision(entry), **launch.options(entry),
    )
    return found


def offsets(c: Call | Prefill) -> tuple[Tensor | None, Tensor | None]:
    """Of rows and of columns; those of columns are None where they are the rows'."""
    return c.cu_seqlens, None if c.place == SAME else c.key_offsets


def shared(c: Call | Prefill) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What all kernels over rows or columns are launched with: softcap, T, TK, N, TOTAL, window and gap, None where
    that goes without saying; then what is compiled in.
    """
    (batch, time, query_heads, key_width), (count, heads, value_width) = c.q.shape, c.v.shape[1:]
    window = max(time, count) if c.window_size is None else c.window_size
    sizes = (c.softcap, time, None if c.place == SAME else count, packed_sequences(c.cu_seqlens), batch * count, window)
    return (*sizes, c.gap), {
        "HQ": query_heads, "H": heads, "K": key_width, "V": value_width,
        "BK": launch.block(WIDEST, key_width), "BV": launch.block(WIDEST, value_width),
        "WINDOW": c.window_size is not None, "PLACE": c.place,
    }


def refuse_widths(c: Call | Prefill | Decoding) -> None:
    """One program holds whole rows of q, k and v."""
    for name, x, letter in (("q", c.q, "K"), ("v", c.v, "V")):
        if x.shape[3] > WIDEST:
            raise ValueError(f"{name} must have {letter} <= {WIDEST} on a GPU, got {letter} = {x.shape[3]}")
