"""The gradient of the parallel and the rectangular form: weights are computed again from logarithms, in two walks.

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
from ..call import LAST, RESIDUAL_SCALE, SAME, Call, Gradients, Need, Outputs, Prefill, PrefillNeed
from .decay import decay_gradient, decay_sums
from .key_gradient import attn_key_gradient_kernel
from .parallel import WIDEST, offsets, shared
from .query_gradient import EVER, attn_query_gradient_kernel
from .scores import LOG2E

REST = tl.constexpr(RESIDUAL_SCALE)


@triton.jit(do_not_specialize=["TOTAL"])
def attn_row_terms_kernel(
    o, rest, do, lse, dlse,                 # [TOTAL, HQ, V] x 3, [TOTAL, HQ] x 2
    delta, logs,                            # [HQ, TOTAL] x 2
    TOTAL,
    HQ: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):
    """delta, and lse in powers of two, with a head's steps side by side; of a row that sees nothing, lse is inf here:
    nothing has weight.
    """
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
    log = tl.where(log == float("-inf"), EVER, log)
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


def backward(c: Call | Prefill, d: Outputs, need: Need | PrefillNeed, saved: Outputs) -> Gradients:
    """The gradients that are needed, each in its input's dtype."""
    if c.window_size == 0:
        return outputs.gradients_without_keys(c, d, need)
    c, d, saved = (contiguous(x) for x in (c, d, saved))
    (batch, time, query_heads, key_width), (count, heads, value_width) = c.q.shape, c.v.shape[1:]
    logs, delta = row_terms(d, saved)
    found = {
        name: torch.empty_like(getattr(c, name)) if getattr(need, name) else None for name in ("q", "k", "v", "decay")
    }
    drow = dcolumn = None
    if need.g:
        dcolumn = logs.new_empty((query_heads, batch * count))
        if c.place == SAME:
            drow = torch.empty_like(dcolumn)
        elif c.place == LAST:  # some keys have no query
            drow = torch.zeros_like(dcolumn)
    gates = decay_sums(c, backward=True)
    sizes, settings = shared(c)
    if need.q or need.g or need.decay:
        entry = launch.entry("attn_query_gradient", c.q, key_width, value_width)
        index = chunk_index.build(batch, time, c.cu_seqlens, entry["BM"])
        launch.run(
            attn_query_gradient_kernel, index.rows * query_heads,
            c.q, c.k, c.v, d.o, *gates[:3], c.decay, logs, delta, found["q"], drow, found["decay"],
            *offsets(c), index.sequence, index.ends, batch * time, c.factor, *sizes,
            **settings, BM=entry["BM"], BN=entry["BN"], PRECISION=launch.precision(entry), **launch.options(entry),
        )
    if need.k or need.v or need.g:
        entry = launch.entry("attn_key_gradient", c.q, key_width, value_width)
        index = chunk_index.build(batch, count, c.key_offsets, entry["BN"])
        launch.run(
            attn_key_gradient_kernel, index.rows * heads,
            c.q, c.k, c.v, d.o, *gates, c.decay, logs, delta, found["k"], found["v"], dcolumn,
            *offsets(c), index.sequence, index.ends, batch * time, c.factor, *sizes,
            **settings, BM=entry["BM"], BN=entry["BN"], PRECISION=launch.precision(entry),
            NEED_K=need.k or need.g, NEED_V=need.v, **launch.options(entry),
        )
    if need.g:
        found["g"] = decay_gradient(c, drow, dcolumn)
    if need.sink_bias:
        share = torch.exp2(c.sink_bias.float()[:, None] * LOG2E.value - logs) * delta
        found["sink_bias"] = -share.sum(1, dtype=torch.float64).to(c.sink_bias.dtype)
    return tuple(found.get(name) for name in need._fields)
