"""The two products of a gated recurrence in which every memory slot has a gate of its own, one program per chunk, head
and block of columns. With X [U, M] the state before the chunk, whose columns have the gates, and
W_ijm = exp(P_im - P_jm):

    value-gated    y_i [M] = scale (sum_{j < i} (a_i . u_j) W_ij w_j + exp(P_i) X^T a_i)
    key-gated      y_i [U] = sum_{j <= i} (sum_m r_im W_ijm w_jm) u_j + X (exp(P_i) r_i)

The weights of the slots, softmax and decays are float32, and so are the operands of every product with them (PRECISION
says how they are multiplied). In reverse, which only the key-gated product runs, step j sees the steps i >= j of all
heads of the group, and X is the gradient that arrives after the chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.chunk_index import locate_chunk
from fla_ops.common.gpu.tiles import dot, load_rows, split_program, state_tile, store_rows

from .chunks import Chunks
from .levels import contract_levels, diagonal, from_start, load_log_decays, spread_levels, to_end


@triton.jit
def scores_of(
    a, u,                                   # at one head of [time, HA, U], [time, HU, U]
    first, steps,
    HA: tl.constexpr, HU: tl.constexpr, U: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, PRECISION: tl.constexpr,
):
    """a_i . u_j, [BT, BT]."""
    scores = tl.zeros([BT, BT], tl.float32)
    for width in range(0, U, BU):
        rows = load_rows(a, first, steps, width, HA, U, BT, BU)
        scores += dot(rows, tl.trans(load_rows(u, first, steps, width, HU, U, BT, BU)), PRECISION)
    return scores


@triton.jit
def across_chunks(
    a, states, matrix, first, steps, slot,  # a at one head of [time, HA, U]; [rows, H, U, M]
    HA: tl.constexpr, U: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, BM: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):
    """X^T a_i, [BT, BM]."""
    read = tl.zeros([BT, BM], tl.float32)
    for width in range(0, U, BU):
        rows = load_rows(a, first, steps, width, HA, U, BT, BU)
        at, inside = state_tile(matrix, width, slot, U, M, BU, BM, TRANSPOSED)
        read += dot(rows.to(tl.float32), tl.load(states + at, mask=inside, other=0.0), PRECISION)
    return read


@triton.jit(do_not_specialize=["T", "N"])
def channel_spread_kernel(
    a, u, w, g,                             # [B, T, HA, U], [B, T, H, U], [B, T, H, M] x 2; HA = H * GROUP
    states, y, own,                         # [rows, H, U, M] or TRANSPOSED, [B, T, HA, M], [B, T, HA]
    cu_seqlens, chunk_sequence, chunk_ends,     # [N + 1], [rows], [N]
    scale, T, N,
    H: tl.constexpr, GROUP: tl.constexpr, U: tl.constexpr, M: tl.constexpr,
    BT: tl.constexpr, BU: tl.constexpr, BM: tl.constexpr, LEVELS: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Writes y, from earlier steps alone, and own_i = scale a_i . u_i, what a step reads of its own w_i."""
    HA: tl.constexpr = H * GROUP
    row, head, block = split_program((M + BM - 1) // BM, HA)
    start, length, i = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps, slot = start + i * BT, length - i * BT, block * BM
    if steps <= 0:
        return
    source = head // GROUP
    a += head * U
    u += source * U
    scores = scores_of(a, u, first, steps, HA, H, U, BT, BU, PRECISION)
    if block == 0:
        t = tl.arange(0, BT)
        tl.store(own + (first + t) * HA + head, diagonal(scores, BT) * scale, mask=t < steps)
    log_decay = load_log_decays(g + source * M, first, steps, slot, H, M, BT, BM)
    writers = load_rows(w + source * M, first, steps, slot, H, M, BT, BM).to(tl.float32)
    read = spread_levels(scores, writers, log_decay, BT, BM, LEVELS, False, PRECISION)
    outer = across_chunks(a, states, row * H + source, first, steps, slot, HA, U, M, BT, BU, BM, TRANSPOSED, PRECISION)
    read += outer * from_start(g + source * M, first, steps, slot, H, M, BT, BM)
    store_rows(y + head * M, read * scale, first, steps, slot, HA, M, BT, BM)


@triton.jit
def softmax_argument(
    earlier, s, self,                       # at one head of [time, HR, M], [time, H, M]; [BT]
    first, steps, slot,
    H: tl.constexpr, HR: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
):
    """[BT, BM], -inf past the last slot."""
    x = load_rows(earlier, first, steps, slot, HR, M, BT, BM)
    x += self[:, None] * load_rows(s, first, steps, slot, H, M, BT, BM).to(tl.float32)
    return tl.where(slot + tl.arange(0, BM)[None, :] < M, x, float("-inf"))


@triton.jit
def softmax_parts(
    earlier, own, s,                        # at one head of [time, HR, M], [time, HR], [time, H, M]
    first, steps,
    H: tl.constexpr, HR: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, SOFTMAX: tl.constexpr,
):
    """The weight of each step's own slots, and the logarithm of the softmax's denominator, [BT] each; zeros if there
    is no softmax.
    """
    self = tl.zeros([BT], tl.float32)
    log_total = tl.zeros([BT], tl.float32)
    if SOFTMAX:
        t = tl.arange(0, BT)
        self = tl.load(own + (first + t) * HR, mask=t < steps, other=0.0)
        largest = tl.full([BT], float("-inf"), tl.float32)
        for slot in range(0, M, BM):
            x = softmax_argument(earlier, s, self, first, steps, slot, H, HR, M, BT, BM)
            larger = tl.maximum(largest, tl.max(x, 1))
            log_total = log_total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger[:, None]), 1)
            largest = larger
        log_total = largest + tl.log(log_total)
    return self, log_total


@triton.jit
def load_readers(
    r, w, self, log_total,                  # at one head of [time, HR, M], [time, HW, M]; [BT] x 2
    first, steps, slot,
    HR: tl.constexpr, HW: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, SOFTMAX: tl.constexpr,
):
    """r as it is or its softmax, [BT, BM], float32."""
    if SOFTMAX:
        readers = tl.exp(softmax_argument(r, w, self, first, steps, slot, HW, HR, M, BT, BM) - log_total[:, None])
    else:
        readers = load_rows(r, first, steps, slot, HR, M, BT, BM).to(tl.float32)
    return readers


@triton.jit(do_not_specialize=["T", "N"])
def channel_contract_kernel(
    r, own, w, u, g,                        # [B, T, HR, M], [B, T, HR], [B, T, HW, M], [B, T, HW, U], [B, T, H, M]
    states, y,                              # [rows, H, U, M] or TRANSPOSED, [B, T, HR, U]
    cu_seqlens, chunk_sequence, chunk_ends,     # [N + 1], [rows], [N]
    T, N,
    H: tl.constexpr, READERS: tl.constexpr, WRITERS: tl.constexpr, U: tl.constexpr, M: tl.constexpr,
    BT: tl.constexpr, BU: tl.constexpr, BM: tl.constexpr, LEVELS: tl.constexpr,
    SOFTMAX: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):
    """HR = H * READERS, HW = H * WRITERS; one of the two is a group. SOFTMAX: r is what earlier steps add to its
    argument.
    """
    HR: tl.constexpr = H * READERS
    HW: tl.constexpr = H * WRITERS
    row, head, block = split_program((U + BU - 1) // BU, HR)
    start, length, i = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps, width = start + i * BT, length - i * BT, block * BU
    if steps <= 0:
        return
    source = head // READERS
    r += head * M
    g += source * M
    u += source * (WRITERS * U)
    w += source * (WRITERS * M)
    self, log_total = softmax_parts(r, None if own is None else own + head, w, first, steps, HW, HR, M, BT, BM, SOFTMAX)
    out = tl.zeros([BT, BU], tl.float32)
    for slot in range(0, M, BM):
        readers = load_readers(r, w, self, log_total, first, steps, slot, HR, HW, M, BT, BM, SOFTMAX)
        if REVERSE:
            readers *= to_end(g, first, steps, slot, H, M, BT, BM)
        else:
            readers *= from_start(g, first, steps, slot, H, M, BT, BM)
        at, inside = state_tile(row * H + source, width, slot, U, M, BU, BM, TRANSPOSED)
        out += dot(readers, tl.trans(tl.load(states + at, mask=inside, other=0.0)), PRECISION)
    for j in range(WRITERS):
        scores = tl.zeros([BT, BT], tl.float32)
        for slot in range(0, M, BM):
            readers = load_readers(r, w, self, log_total, first, steps, slot, HR, HW, M, BT, BM, SOFTMAX)
            writers = load_rows(w + j * M, first, steps, slot, HW, M, BT, BM).to(tl.float32)
            log_decay = load_log_decays(g, first, steps, slot, H, M, BT, BM)
            scores += contract_levels(readers, writers, log_decay, BT, BM, LEVELS, REVERSE, PRECISION)
        values = load_rows(u + j * U, first, steps, width, HW, U, BT, BU)
        out += dot(scores, values.to(tl.float32), PRECISION)
    store_rows(y + head * U, out, first, steps, width, HR, U, BT, BU)


def value_gated(
    chunks: Chunks, a: Tensor, u: Tensor, w: Tensor, states: Tensor, transposed: bool, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The strictly causal part of what each head of a [B, T, HA, U] reads, [B, T, HA, M], and the diagonal, its weight
    on its own step, [B, T, HA]; float32.
    """
    (batch, time, heads, slots), (query_heads, width), index = chunks.g.shape, a.shape[2:], chunks.index
    y = torch.empty(batch, time, query_heads, slots, dtype=torch.float32, device=a.device)
    diagonal = torch.empty(batch, time, query_heads, dtype=torch.float32, device=a.device)
    entry = launch.entry("channel_spread", a, width, slots)
    width_block, slot_block = launch.block(entry["BU"], width), launch.block(entry["BM"], slots)
    launch.run(
        channel_spread_kernel,
        index.rows * query_heads * triton.cdiv(slots, slot_block),
        a, u, w, chunks.g, states, y, diagonal, chunks.cu_seqlens, index.sequence, index.ends,
        scale, time, chunks.packed,
        H=heads, GROUP=query_heads // heads, U=width, M=slots,
        BT=index.size, BU=width_block, BM=slot_block, LEVELS=chunks.levels,
        TRANSPOSED=transposed, PRECISION=launch.precision(entry), **launch.options(entry),
    )
    return y, diagonal


def key_gated(
    chunks: Chunks,
    r: Tensor,
    w: Tensor,
    u: Tensor,
    states: Tensor,
    transposed: bool,
    y: Tensor,
    diagonal: Tensor | None = None,
    reverse: bool = False,
) -> None:
    """Fill y [B, T, HR, U] with what the queries r read. With `diagonal` (see value_gated), r is the strictly causal
    part of the argument of the softmax that reads.
    """
    (_, time, heads, slots), (query_heads, width), index = chunks.g.shape, y.shape[2:], chunks.index
    entry = launch.entry("channel_contract", u, width, slots)
    width_block, slot_block = launch.block(entry["BU"], width), launch.block(entry["BM"], slots)
    launch.run(
        channel_contract_kernel,
        index.rows * query_heads * triton.cdiv(width, width_block),
        r, diagonal, w, u, chunks.g, states, y, chunks.cu_seqlens, index.sequence, index.ends, time, chunks.packed,
        H=heads, READERS=query_heads // heads, WRITERS=w.shape[2] // heads, U=width, M=slots,
        BT=index.size, BU=width_block, BM=slot_block, LEVELS=chunks.levels,
        SOFTMAX=diagonal is not None, REVERSE=reverse, TRANSPOSED=transposed,
        PRECISION=launch.precision(entry), **launch.options(entry),
    )
