"""The gradient of the parallel form: weights are computed again from the saved logarithms, in two walks.

    p_ij = exp(x_ij - lse_i),  dx_ij = p_ij (do_i . v_j - delta_i),  delta_i = do_i . o_i - dlse_i
    dq_i = scale sum_j dx_ij k_j,  dk_j = scale sum_i dx_ij q_i,  dv_j = sum_i p_ij do_i

One walk (query_gradient.py) holds a block of rows, the other (key_gradient.py) a block of columns. A gate acts through
the running sum of gates, whose gradient is the sum of dx over a row less that over a column. A sink's gradient is
-sum_i exp(sink - lse_i) delta_i.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.attn import decay
from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import contiguous, scale_of
from fla_ops.common.gpu.tiles import load_rows, split_program

from .gates import LOG2E, decay_gradient, decay_sums
from .key_gradient import attn_key_gradient_kernel
from .parallel import WIDEST
from .query_gradient import attn_query_gradient_kernel

REST = tl.constexpr(decay.REST)


@triton.jit(do_not_specialize=["TOTAL"])
def attn_row_terms_kernel(
    o, rest, do, lse, dlse,                 # [TOTAL, HQ, V] x 3, [TOTAL, HQ] x 2
    delta, logs,                            # [HQ, TOTAL] x 2
    TOTAL,
    HQ: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):
    """delta, and lse in powers of two, with a head's steps side by side."""
    block, head, _ = split_program(1, HQ)
    row = block * BM
    steps = TOTAL - row
    t = row + tl.arange(0, BM)
    inside = t < TOTAL
    out = load_rows(o + head * V, row, steps, 0, HQ, V, BM, BV).to(tl.float32)
    if rest is not None:
        out += load_rows(rest + head * V, row, steps, 0, HQ, V, BM, BV).to(tl.float32) / REST
    found = tl.sum(out * load_rows(do + head * V, row, steps, 0, HQ, V, BM, BV).to(tl.float32), 1)
    if dlse is not None:
        found -= tl.load(dlse + t * HQ + head, mask=inside, other=0.0)
    tl.store(delta + head.to(tl.int64) * TOTAL + t, found, mask=inside)
    log = tl.load(lse + t * HQ + head, mask=inside, other=0.0) * LOG2E
    tl.store(logs + head.to(tl.int64) * TOTAL + t, log, mask=inside)


def row_terms(o: Tensor, rest: Tensor | None, do: Tensor, lse: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """lse in powers of two, and delta, [HQ, B * T] each."""
    batch, time, heads, width = o.shape
    logs, delta = (torch.empty((heads, batch * time), dtype=torch.float32, device=o.device) for _ in range(2))
    entry = launch.entry("attn_row_terms", o, width, width)
    launch.run(
        attn_row_terms_kernel,
        triton.cdiv(batch * time, entry["BM"]) * heads,
        o, rest, do, lse, dlse, delta, logs, batch * time,
        HQ=heads, V=width, BM=entry["BM"], BV=launch.block(WIDEST, width), **launch.options(entry),
    )
    return logs, delta


def backward(q, k, v, g, sink_bias, cu_seqlens, o, lse, rest, do, dlse, scale, window_size, output_mask):
    """The gradients that output_mask asks for (q, k, v, g, sink_bias), each in its input's dtype."""
    need_q, need_k, need_v, need_g, need_sink = output_mask
    batch, time, query_heads, key_width = q.shape
    heads, value_width = v.shape[2:]
    q, k, v, o, lse, rest, do, dlse, cu_seqlens = contiguous(q, k, v, o, lse, rest, do, dlse, cu_seqlens)
    logs, delta = row_terms(o, rest, do, lse, dlse)
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in ((q, need_q), (k, need_k), (v, need_v))
    )
    drow, dcolumn = (torch.empty_like(logs) if need_g else None for _ in range(2))
    gates = decay_sums(g, cu_seqlens, backward=True)
    call = {
        "HQ": query_heads, "H": heads, "K": key_width, "V": value_width,
        "BK": launch.block(WIDEST, key_width), "BV": launch.block(WIDEST, value_width),
        "WINDOW": window_size is not None,
    }
    sizes = (
        scale_of(q, scale), time, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, batch * time,
        time if window_size is None else window_size,
    )
    if need_q or need_g:
        entry = launch.entry("attn_query_gradient", q, key_width, value_width)
        index = chunk_index.build(batch, time, cu_seqlens, entry["BM"])
        launch.run(
            attn_query_gradient_kernel, index.rows * query_heads,
            q, k, v, do, *gates[:3], logs, delta, dq, drow, cu_seqlens, index.sequence, index.ends, *sizes,
            **call, BM=entry["BM"], BN=entry["BN"], PRECISION=launch.precision(entry), **launch.options(entry),
        )
    if need_k or need_v or need_g:
        entry = launch.entry("attn_key_gradient", q, key_width, value_width)
        index = chunk_index.build(batch, time, cu_seqlens, entry["BN"])
        launch.run(
            attn_key_gradient_kernel, index.rows * heads,
            q, k, v, do, *gates, logs, delta, dk, dv, dcolumn, cu_seqlens, index.sequence, index.ends, *sizes,
            **call, BM=entry["BM"], BN=entry["BN"], PRECISION=launch.precision(entry),
            NEED_K=need_k or need_g, NEED_V=need_v, **launch.options(entry),
        )
    dg = decay_gradient(g, drow, dcolumn, cu_seqlens) if need_g else None
    dsink = None
    if need_sink:
        share = torch.exp2(sink_bias.float()[:, None] * LOG2E.value - logs) * delta
        dsink = -share.sum(1, dtype=torch.float64).to(sink_bias.dtype)
    return dq, dk, dv, dg, dsink
