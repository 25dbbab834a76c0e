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
from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import contiguous
from fla_ops.common.gpu.tiles import load_rows, split_program

from .. import outputs
from ..call import RESIDUAL_SCALE, Call, Gradients, Need, Outputs
from .decay import LOG2E, decay_gradient, decay_sums
from .key_gradient import attn_key_gradient_kernel
from .parallel import WIDEST, shared
from .query_gradient import attn_query_gradient_kernel

REST = tl.constexpr(RESIDUAL_SCALE)


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


def row_terms(d: Outputs, saved: Outputs) -> tuple[Tensor, Tensor]:
    """lse in powers of two, and delta, [HQ, B * T] each."""
    batch, time, heads, width = saved.o.shape
    logs, delta = (saved.o.new_empty((heads, batch * time), dtype=torch.float32) for _ in range(2))
    entry = launch.entry("attn_row_terms", saved.o, width, width)
    launch.run(
        attn_row_terms_kernel,
        triton.cdiv(batch * time, entry["BM"]) * heads,
        saved.o, saved.rest, d.o, saved.lse, d.lse, delta, logs, batch * time,
        HQ=heads, V=width, BM=entry["BM"], BV=launch.block(WIDEST, width), **launch.options(entry),
    )
    return logs, delta


def backward(c: Call, d: Outputs, need: Need, saved: Outputs) -> Gradients:
    """The gradients that are needed, each in its input's dtype."""
    if c.window_size == 0:
        return outputs.gradients_without_keys(c, d, need)
    c, d, saved = (contiguous(x) for x in (c, d, saved))
    (batch, time, query_heads, key_width), value_width = c.q.shape, c.v.shape[3]
    logs, delta = row_terms(d, saved)
    dq, dk, dv = (
        torch.empty_like(x) if wanted else None for wanted, x in zip(need[:3], (c.q, c.k, c.v), strict=True)
    )
    drow, dcolumn = (torch.empty_like(logs) if need.g else None for _ in range(2))
    gates = decay_sums(c, backward=True)
    sizes, settings = shared(c)
    if need.q or need.g:
        entry = launch.entry("attn_query_gradient", c.q, key_width, value_width)
        index = chunk_index.build(batch, time, c.cu_seqlens, entry["BM"])
        launch.run(
            attn_query_gradient_kernel, index.rows * query_heads,
            c.q, c.k, c.v, d.o, *gates[:3], logs, delta, dq, drow,
            c.cu_seqlens, index.sequence, index.ends, c.factor, *sizes,
            **settings, BM=entry["BM"], BN=entry["BN"], PRECISION=launch.precision(entry), **launch.options(entry),
        )
    if need.k or need.v or need.g:
        entry = launch.entry("attn_key_gradient", c.q, key_width, value_width)
        index = chunk_index.build(batch, time, c.cu_seqlens, entry["BN"])
        launch.run(
            attn_key_gradient_kernel, index.rows * c.k.shape[2],
            c.q, c.k, c.v, d.o, *gates, logs, delta, dk, dv, dcolumn,
            c.cu_seqlens, index.sequence, index.ends, c.factor, *sizes,
            **settings, BM=entry["BM"], BN=entry["BN"], PRECISION=launch.precision(entry),
            NEED_K=need.k or need.g, NEED_V=need.v, **launch.options(entry),
        )
    dg = decay_gradient(c, drow, dcolumn) if need.g else None
    dsink = None
    if need.sink_bias:
        share = torch.exp2(c.sink_bias.float()[:, None] * LOG2E.value - logs) * delta
        dsink = -share.sum(1, dtype=torch.float64).to(c.sink_bias.dtype)
    return dq, dk, dv, dg, dsink
