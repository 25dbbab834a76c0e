"""The state before each chunk, and the gradient that arrives after each chunk: one walk along each sequence.

Forward:  S' = d S + sum_j b_j k_j v_j^T, with b_j the decay from step j to the chunk's end and d that of the chunk.
Reverse:  dS = d dS' + scale sum_i a_i q_i do_i^T, with a_i the decay from the chunk's start to step i.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.chunk_index import ChunkIndex, first_row, sequence_bounds
from fla_ops.common.gpu.decay import block_decay, decayed, gate
from fla_ops.common.gpu.tiles import dot, load_rows, nearest, split_program, state_tile, store_back

from ..call import Call, Prefill
from .pools import pool_tile, slot_of


@triton.jit(do_not_specialize=["T", "P"])
def chunk_state_kernel(
    k, v, g,                    # [B, T, HK, K], [B, T, H, V], [B, T, H] or [H]; REVERSE: q and do for k and v
    initial, states, final,     # [N, H, K, V], [rows, H, K, V], [N, H, K, V]; TRANSPOSED: first and last [N, H, V, K]
    recorded, recorded_ends,    # [C, H, K, V] or TRANSPOSED, [N]: the states after every EVERY steps, running counts
    pool, slots, fresh,         # [P, H, K, V], [N], [N]; given, the pool's rows are the initial and final states
    stride_p, stride_h, stride_k, stride_v,     # of pool
    cu_seqlens, chunk_ends,     # [N + 1], [N]
    scale, T, P,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
    EVERY: tl.constexpr,
):
    """One program carries one [BK, BV] tile of one head's state along one sequence."""
    VALUE_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    KEY_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    n, head, block = split_program(KEY_BLOCKS * VALUE_BLOCKS, H)
    key, value = block // VALUE_BLOCKS * BK, block % VALUE_BLOCKS * BV
    start, length = sequence_bounds(n, cu_seqlens, T)
    row = first_row(n, chunk_ends, T, BT)
    k += head // (H // HK) * K
    v += head * V

    state = tl.zeros([BK, BV], tl.float32)
    at, inside = state_tile(n * H + head, key, value, K, V, BK, BV, TRANSPOSED)
    if initial is not None:
        state += tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    if pool is not None:
        slot = slot_of(slots, n)
        if (slot < 0) | (slot >= P):
            return
        at_row, in_row = pool_tile(
            pool, slot, head, key, value, stride_p, stride_h, stride_k, stride_v, K, V, BK, BV
        )
        starts = in_row
        if fresh is not None:
            starts = in_row & (tl.load(fresh + n) == 0)
        state += tl.load(at_row, mask=starts, other=0.0).to(tl.float32)
    chunks = tl.cdiv(length, BT)
    for c in range(chunks):
        i = chunks - 1 - c if REVERSE else c
        first, steps = start + i * BT, length - i * BT
        if states is not None:
            into, kept = state_tile((row + i) * H + head, key, value, K, V, BK, BV, False)
            tl.store(states + into, nearest(state, states.dtype.element_ty), mask=kept)
        keys = load_rows(k, first, steps, key, HK, K, BT, BK)
        values = load_rows(v, first, steps, value, H, V, BT, BV)
        _, _, leave, log_total = block_decay(g, first, steps, head, H, BT, DECAY, REVERSE)
        if DECAY != "none" or REVERSE:
            values = nearest(values * (scale * leave)[:, None], values.dtype)
        state = decayed(state, log_total, DECAY) + dot(tl.trans(keys), values, PRECISION)
        if recorded is not None:
            after = (i + 1) * BT
            if (after % EVERY == 0) & (after <= length):
                first_recorded = n * (T // EVERY)
                if recorded_ends is not None:
                    first_recorded = tl.load(recorded_ends + n - 1, mask=n > 0, other=0)
                at_recorded, there = state_tile(
                    (first_recorded + after // EVERY - 1) * H + head, key, value, K, V, BK, BV, TRANSPOSED
                )
                tl.store(recorded + at_recorded, state, mask=there)
    if final is not None:
        tl.store(final + at, nearest(state, final.dtype.element_ty), mask=inside)
    if pool is not None:
        store_back(at_row, state, in_row)


class Ends(NamedTuple):
    """Where each walk starts, and where it leaves its end: in states of the sequences, or in their rows of a pool."""

    initial: Tensor | None = None  # [N, H, K, V], or [N, H, V, K] with state_v_first
    final: Tensor | None = None  # as initial, to be filled
    recorded: Tensor | None = None  # [C, H, K, V] or [C, H, V, K], to be filled: states after every `every` steps
    every: int = 1
    pool: Tensor | None = None  # [P, H, K, V] with any strides
    slots: Tensor | None = None  # [N]
    fresh: Tensor | None = None  # [N]
    strides: tuple[int, ...] = (0,) * 4  # of the pool
    rows: int = 0  # P


def ends_of(c: Prefill) -> Ends:
    """Rows of the call's pool."""
    fresh = None if c.fresh is None else c.fresh.view(torch.uint8)
    return Ends(pool=c.pool, slots=c.slots, fresh=fresh, strides=c.pool.stride(), rows=c.pool.shape[0])


def chunk_states(
    index: ChunkIndex,
    c: Call,
    k: Tensor,
    v: Tensor,
    ends: Ends,
    scale: float = 1.0,
    reverse: bool = False,
    keep: bool = True,
) -> Tensor | None:
    """The state before each chunk, [rows, H, K, V] in k's dtype, or float32 where that is float16, which could not hold
    it (see dot_state); kept only if asked for.

    With reverse=True, k and v are q and do, and the result is the gradient that arrives after each chunk.
    """
    decay = gate(c)
    time, key_heads, key_width = k.shape[1:]
    heads, value_width = v.shape[2:]
    dtype = torch.float32 if k.dtype is torch.float16 else k.dtype
    states = torch.empty(index.rows, heads, key_width, value_width, dtype=dtype, device=k.device) if keep else None
    packed = ends.recorded is not None and c.cu_seqlens is not None
    recorded_ends = torch.cumsum(c.cu_seqlens.diff() // ends.every, 0) if packed else None
    entry = launch.entry("chunk_state", k, key_width, value_width)
    key_block, value_block = launch.block(entry["BK"], key_width), launch.block(entry["BV"], value_width)
    launch.run(
        chunk_state_kernel,
        c.sequences * heads * triton.cdiv(key_width, key_block) * triton.cdiv(value_width, value_block),
        k, v, decay[0], ends.initial, states, ends.final, ends.recorded, recorded_ends,
        ends.pool, ends.slots, ends.fresh, *ends.strides,
        c.cu_seqlens, index.ends, scale, time, ends.rows,
        H=heads, HK=key_heads, K=key_width, V=value_width, BT=index.size, BK=key_block, BV=value_block,
        DECAY=decay[1], PRECISION=launch.precision(entry), REVERSE=reverse, TRANSPOSED=c.state_v_first,
        EVERY=ends.every, **launch.options(entry),
    )
    return states
