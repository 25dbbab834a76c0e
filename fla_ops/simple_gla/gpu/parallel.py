"""The quadratic form: one program per block of rows walks the blocks of columns away from the diagonal.

    o_i = sum_{j <= i} A_ij v_j,    A_ij = scale exp(g_{j+1} + ... + g_i) q_i . k_j

Off the diagonal the exponent is a sum of three, with no difference: from the start of i's block to step i, between the
blocks, from step j to the end of its block. The gradients are the same kernel with the roles exchanged, REVERSE where
the columns lie after the rows:

    dq: (do, v, k),  dk: (v, do, q) in reverse,  dv: (k, q, do) in reverse;  the first two add dA to do . v.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import contiguous, packed_sequences, refuse_float64
from fla_ops.common.gpu.chunk_index import ChunkIndex, locate_chunk
from fla_ops.common.gpu.decay import causal, exponents, gate, load_log_decay, running_sums, within
from fla_ops.common.gpu.heads import group_sum, per_value_head
from fla_ops.common.gpu.tiles import dot, load_rows, nearest, split_program, store_rows

from .. import checks
from ..call import Call, Weighted, WeightsNeed
from .gate_gradient import gate_gradient


@triton.jit
def attention_tile(
    row, column, row_steps, column_steps,   # first step of the rows and of the columns (int64), how many there are
    T, BT: tl.constexpr, SWAPPED: tl.constexpr,
):
    """Offsets and mask of a [BT, BT] tile of a [T, T] matrix, which is SWAPPED when its columns are the rows' steps."""
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    inside = (i < row_steps) & (j < column_steps)
    return (column + j) * T + row + i if SWAPPED else (row + i) * T + column + j, inside


@triton.jit
def block_product(
    q, k, v, weights,                       # at this head: [time, HQ, K], [time, HK, K], [time, HV, V]; [BT, BT]
    attn, dattn, matrix,                    # [*, T, T] x 2, the offset of this head's
    row, column, row_steps, column_steps, origin, value, T,
    HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):
    """What a block of columns adds to a block of rows, [BT, BV]."""
    scores = tl.zeros([BT, BT], tl.float32)
    for key in range(0, K, BK):
        queries = load_rows(q, row, row_steps, key, HQ, K, BT, BK)
        keys = load_rows(k, column, column_steps, key, HK, K, BT, BK)
        scores += dot(queries, tl.trans(keys), PRECISION)
    at, inside = attention_tile(row - origin, column - origin, row_steps, column_steps, T, BT, REVERSE)
    if dattn is not None:
        scores += tl.load(dattn + matrix + at, mask=inside, other=0.0).to(tl.float32)
    scores *= weights
    if attn is not None:
        tl.store(attn + matrix + at, nearest(scores, attn.dtype.element_ty), mask=inside & (value == 0))
    values = load_rows(v, column, column_steps, value, HV, V, BT, BV)
    return dot(nearest(scores, values.dtype), values, PRECISION)


@triton.jit(do_not_specialize=["T", "N"])
def parallel_kernel(
    q, k, v, g,                             # [B, T, HQ, K], [B, T, HK, K], [B, T, HV, V], [B, T, H] or [H]
    o, attn, dattn,                         # [B, T, H, V], [B, H, T, T] x 2
    cu_seqlens, chunk_sequence, chunk_ends,     # [N + 1], [rows], [N]
    scale, T, N,
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):
    row, head, block = split_program((V + BV - 1) // BV, H)
    start, length, i = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps = start + i * BT, length - i * BT
    if steps <= 0:
        return
    q += head // (H // HQ) * K
    k += head // (H // HK) * K
    v += head // (H // HV) * V
    # Packed sequences share one matrix per head, a batch has one matrix per sequence and head.
    batch = start // T if cu_seqlens is None else 0
    origin = batch * T
    matrix = (batch * H + head.to(tl.int64)) * T * T

    if DECAY != "none":
        sums, count = running_sums(load_log_decay(g, first, steps, head, H, BT, DECAY))
        enter, leave, total = exponents(sums, count, BT, REVERSE)
        weights = within(sums, count, BT, REVERSE) * scale
    else:
        weights = tl.where(causal(BT, REVERSE), scale, 0.0)
    out = block_product(
        q, k, v, weights, attn, dattn, matrix, first, first, steps, steps, origin, block * BV, T,
        HQ, HK, HV, K, V, BT, BK, BV, PRECISION, REVERSE,
    )
    between = 0.0
    for away in range(1, tl.cdiv(length, BT) - i if REVERSE else i + 1):
        j = i + away if REVERSE else i - away
        column, column_steps = start + j * BT, length - j * BT
        if DECAY != "none":
            sums, count = running_sums(load_log_decay(g, column, column_steps, head, H, BT, DECAY))
            _, leave, total = exponents(sums, count, BT, REVERSE)
            weights = tl.exp2(enter[:, None] + (leave + between)[None, :]) * scale
            between += total
        else:
            weights = tl.full([BT, BT], 1.0, tl.float32) * scale
        out += block_product(
            q, k, v, weights, attn, dattn, matrix, first, column, steps, column_steps, origin, block * BV, T,
            HQ, HK, HV, K, V, BT, BK, BV, PRECISION, REVERSE,
        )
    store_rows(o + head * V, out, first, steps, block * BV, H, V, BT, BV)


def product(
    c: Call,
    index: ChunkIndex,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    attn: Tensor | None = None,
    dattn: Tensor | None = None,
    reverse: bool = False,
) -> None:
    """Fill o [B, T, H, V], and the visible part of attn where given, from q, k, v in their roles."""
    decay, key_width, heads, value_width = gate(c), k.shape[3], o.shape[2], v.shape[3]
    entry = launch.entry("parallel", q, key_width, value_width)
    value_block = launch.block(entry["BV"], value_width)
    launch.run(
        parallel_kernel,
        index.rows * heads * triton.cdiv(value_width, value_block),
        q, k, v, decay[0], o, attn, dattn, c.cu_seqlens, index.sequence, index.ends,
        c.factor, q.shape[1], packed_sequences(c.cu_seqlens),
        H=heads, HQ=q.shape[2], HK=k.shape[2], HV=v.shape[2], K=key_width, V=value_width,
        BT=index.size, BK=launch.block(entry["BK"], key_width), BV=value_block,
        DECAY=decay[1], PRECISION=launch.precision(entry), REVERSE=reverse, **launch.options(entry),
    )


def _index(c: Call) -> ChunkIndex:
    """Blocks of the entry's size; both roles of k and v take the same blocks."""
    width = max(c.k.shape[3], c.v.shape[3])
    size = launch.entry("parallel", c.q, width, width)["BT"]
    return chunk_index.build(c.q.shape[0], c.q.shape[1], c.cu_seqlens, size)


def forward(c: Call):
    """o [B, T, H, V] and attn [B, H, T, T] or None, both in v's dtype."""
    checks.eager(c)
    refuse_float64(c.q)
    c = contiguous(c)
    q, k, v = c.q, c.k, c.v
    batch, time, heads, _ = v.shape
    attn = torch.zeros((batch, heads, time, time), dtype=v.dtype, device=v.device) if c.output_attentions else None
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    product(c, _index(c), q, k, v, o, attn)
    return o, attn


def backward(c: Call, d: Weighted, need: WeightsNeed):
    """The gradients that are needed, each in its input's dtype."""
    need_gate = need.g or need.g_gamma
    c, d = contiguous(c), contiguous(d)
    q, k, v, do, dattn, cu_seqlens = c.q, c.k, c.v, d.o, d.attn, c.cu_seqlens
    heads, decay = v.shape[2], gate(c)
    index = _index(c)
    dq = dk = dv = dg = None
    if need.q or need_gate:
        dq = per_value_head(q, heads, exact=need_gate)
        product(c, index, do, v, k, dq, dattn=dattn)
    if need.k or need_gate:
        dk = per_value_head(q, heads, exact=need_gate)
        product(c, index, v, do, q, dk, dattn=dattn, reverse=True)
    if need.v:
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        product(c, index, k, q, do, dv, reverse=True)
    if need_gate:
        dtype = c.g.dtype if need.g else torch.float32
        dg = gate_gradient(q, k, dq, dk, decay, index, cu_seqlens, dtype)
    return (
        group_sum(dq, q) if need.q else None,
        group_sum(dk, k) if need.k else None,
        dv,
        dg if need.g else None,
        dg.sum((0, 1)).to(c.g_gamma.dtype) if need.g_gamma else None,
    )
