"""The walk back along each sequence: the gradient that arrives after each chunk, and those of its errors.

With N of inverses.py, and dS' what arrives after the chunk,

    dU = (D * Q K^T)^T do + exp(P_C - P) K dS',         F = N^T dU,         dv = beta F
    dS = exp(P_C) dS' + (exp(P) Q)^T do - (exp(P) K)^T dv
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.chunk_index import first_row, locate_chunk, sequence_bounds
from fla_ops.common.gpu.decay import block_decay, decayed
from fla_ops.common.gpu.tiles import dot, load_rows, nearest, split_program, state_tile, store_rows

from .chunks import Chunks, decay_of, is_half
from .inverses import Systems, transposed_inverses
from .products import at_pair, inverse_norm, load_steps, long_dot, precise_dot, squared_norm


@triton.jit(do_not_specialize=["T", "N"])
def delta_score_gradient_kernel(
    q, k, do, g,                            # [B, T, HK, K] x 2, [B, T, H, V], [B, T, H]
    dchanges, asks,                         # [B, T, H, V], [B, T, H]
    scale,
    cu_seqlens, chunk_sequence, chunk_ends, # [N + 1], [rows], [N]
    T, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, NORMALIZE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):
    """What the outputs of a chunk give to the gradients of its changes, and the factors of its queries."""
    row, head, _ = split_program(1, H)
    start, length, i = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps = start + i * BT, length - i * BT
    if steps <= 0:
        return
    q += head // (H // HK) * K
    k += head // (H // HK) * K
    read = tl.zeros([BT, BT], tl.float32)
    of_query = tl.zeros([BT], tl.float32)
    of_key = tl.zeros([BT], tl.float32)
    for key in range(0, K, BK):
        queries = load_rows(q, first, steps, key, HK, K, BT, BK)
        keys = load_rows(k, first, steps, key, HK, K, BT, BK)
        read += dot(queries, tl.trans(keys), PRECISION)
        of_query += squared_norm(queries)
        of_key += squared_norm(keys)
    decay, enter, _, _ = block_decay(g, first, steps, head, H, BT, DECAY, False)
    asking = inverse_norm(of_query, NORMALIZE) * scale
    t = tl.arange(0, BT)
    read *= decay * (asking[:, None] * inverse_norm(of_key, NORMALIZE)[None, :])
    tl.store(asks + (first + t) * H + head, enter * asking, mask=t < steps)
    read = tl.trans(read)
    for value in range(0, V, BV):
        dout = load_rows(do + head * V, first, steps, value, H, V, BT, BV)
        store_rows(
            dchanges + head * V, precise_dot(read, dout, HALF, PRECISION), first, steps, value, H, V, BT, BV
        )


@triton.jit(do_not_specialize=["T"])
def delta_state_gradient_kernel(
    q, k, do, beta,             # [B, T, HK, K] x 2, [B, T, H, V], [B, T, H]
    dchanges, inverse,          # [B, T, H, V], [rows, H, BT, BT]: N transposed
    reads, writes, asks, totals,        # [B, T, H] x 3, [rows, H]
    last, dstates, dinitial,    # [N, H, K, V], [rows, H, K, V], [N, H, K, V]; TRANSPOSED: first and last [N, H, V, K]
    solved,                     # [B, T, H, V]: F
    cu_seqlens, chunk_ends,     # [N + 1], [N]
    T,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, DECAY: tl.constexpr,
):
    """One program carries [K, BV] of the gradient of one head's state along one sequence."""
    n, head, block = split_program((V + BV - 1) // BV, H)
    value = block * BV
    start, length = sequence_bounds(n, cu_seqlens, T)
    row = first_row(n, chunk_ends, T, BT)
    q += head // (H // HK) * K
    k += head // (H // HK) * K
    do += head * V

    dstate = tl.zeros([BK, BV], tl.float32)
    at, inside = state_tile(n * H + head, 0, value, K, V, BK, BV, TRANSPOSED)
    if last is not None:
        dstate += tl.load(last + at, mask=inside, other=0.0).to(tl.float32)
    chunks = tl.cdiv(length, BT)
    for c in range(chunks):
        i = chunks - 1 - c
        first, steps = start + i * BT, length - i * BT
        pair = (row + i) * H + head
        if dstates is not None:
            into, kept = state_tile(0, 0, value, K, V, BK, BV, False)
            tl.store(dstates + pair * (K * V) + into, nearest(dstate, dstates.dtype.element_ty), mask=kept)
        keys = load_rows(k, first, steps, 0, HK, K, BT, BK)
        dchange = long_dot(keys, dstate, HALF, PRECISION) * load_steps(writes, first, steps, head, H, BT)[:, None]
        dchange += load_rows(dchanges + head * V, first, steps, value, H, V, BT, BV)
        derror = precise_dot(tl.load(at_pair(inverse, pair, BT)), dchange, HALF, PRECISION)
        if solved is not None:
            store_rows(solved + head * V, derror, first, steps, value, H, V, BT, BV)
        dout = load_rows(do, first, steps, value, H, V, BT, BV)
        asked = dout * load_steps(asks, first, steps, head, H, BT)[:, None]
        derror *= (load_steps(reads, first, steps, head, H, BT) * load_steps(beta, first, steps, head, H, BT))[:, None]
        queries = load_rows(q, first, steps, 0, HK, K, BT, BK)
        dstate = decayed(dstate, tl.load(totals + pair), DECAY) - precise_dot(tl.trans(keys), derror, HALF, PRECISION)
        dstate += precise_dot(tl.trans(queries), asked, HALF, PRECISION)
    if dinitial is not None:
        tl.store(dinitial + at, nearest(dstate, dinitial.dtype.element_ty), mask=inside)


class WalkBack(NamedTuple):
    """What a walk back starts from, and what it fills."""

    do: Tensor  # [B, T, H, V]
    last: Tensor | None = None  # the gradient of the final state, [N, H, K, V], or [N, H, V, K] with state_v_first
    dinitial: Tensor | None = None  # likewise, of the first state
    dstates: Tensor | None = None  # as `kept_states` has them
    solved: Tensor | None = None  # F [B, T, H, V]


def walk_back(chunks: Chunks, x: Systems, w: WalkBack) -> None:
    """Launch a walk back over the sequences of a call."""
    c, index = chunks.call, chunks.index
    key_width, (heads, value_width) = c.k.shape[3], c.v.shape[2:]
    dchanges, asks = chunks.new(c.v.shape), chunks.new(c.v.shape[:3])
    shared = {"H": heads, "HK": c.k.shape[2], "K": key_width, "V": value_width, "BT": index.size, "HALF": is_half(c)}
    entry = launch.entry("delta_score_gradient", c.k, key_width, value_width)
    launch.run(
        delta_score_gradient_kernel,
        index.rows * heads,
        c.q, c.k, w.do, c.g, dchanges, asks, c.factor, *chunks.by_row,
        BK=launch.block(entry["BK"], key_width), BV=launch.block(entry["BV"], value_width),
        PRECISION=launch.precision(entry), **shared, **chunks.flags, **launch.options(entry),
    )
    entry = launch.entry("delta_state_gradient", c.k, key_width, value_width)
    value_block = launch.block(entry["BV"], value_width)
    launch.run(
        delta_state_gradient_kernel,
        c.sequences * heads * triton.cdiv(value_width, value_block),
        c.q, c.k, w.do, c.beta, dchanges, transposed_inverses(chunks), x.reads, x.writes, asks, x.totals,
        w.last, w.dstates, w.dinitial, w.solved, *chunks.by_sequence,
        BK=launch.block(entry["key_width"], key_width), BV=value_block, PRECISION=launch.precision(entry),
        TRANSPOSED=c.state_v_first, DECAY=decay_of(c), **shared, **launch.options(entry),
    )
