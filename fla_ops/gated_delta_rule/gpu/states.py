"""The walk along each sequence: the state before each chunk, and what the state gets wrong at each step.

With M the inverse of the chunk's triangle,

    E  = M (v - exp(P) K S),                    u_j = beta_j e_j
    S' = exp(P_C) S + sum_j exp(P_C - P_j) k_j u_j^T
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.chunk_index import first_row, sequence_bounds
from fla_ops.common.gpu.decay import decayed
from fla_ops.common.gpu.tiles import load_rows, nearest, split_program, state_tile, store_rows

from .chunks import Chunks, decay_of, is_half
from .inverses import Systems
from .products import at_pair, load_steps, long_dot, precise_dot


@triton.jit(do_not_specialize=["T"])
def delta_state_kernel(
    k, v, beta,                 # [B, T, HK, K], [B, T, H, V], [B, T, H]
    inverse, reads, writes, totals,     # [rows, H, BT, BT], [B, T, H] x 2, [rows, H]
    initial, states, final,     # [N, H, K, V], [rows, H, K, V], [N, H, K, V]; TRANSPOSED: first and last [N, H, V, K]
    changes, errors,            # [B, T, H, V] x 2: u and e
    cu_seqlens, chunk_ends,     # [N + 1], [N]
    T,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, DECAY: tl.constexpr,
):
    """One program carries [K, BV] of one head's state along one sequence."""
    n, head, block = split_program((V + BV - 1) // BV, H)
    value = block * BV
    start, length = sequence_bounds(n, cu_seqlens, T)
    row = first_row(n, chunk_ends, T, BT)
    k += head // (H // HK) * K
    v += head * V

    state = tl.zeros([BK, BV], tl.float32)
    at, inside = state_tile(n * H + head, 0, value, K, V, BK, BV, TRANSPOSED)
    if initial is not None:
        state += tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    for i in range(tl.cdiv(length, BT)):
        first, steps = start + i * BT, length - i * BT
        pair = (row + i) * H + head
        if states is not None:
            into, kept = state_tile(0, 0, value, K, V, BK, BV, False)
            tl.store(states + pair * (K * V) + into, nearest(state, states.dtype.element_ty), mask=kept)
        keys = load_rows(k, first, steps, 0, HK, K, BT, BK)
        values = load_rows(v, first, steps, value, H, V, BT, BV).to(tl.float32)
        values -= long_dot(keys, state, HALF, PRECISION) * load_steps(reads, first, steps, head, H, BT)[:, None]
        error = precise_dot(tl.load(at_pair(inverse, pair, BT)), values, HALF, PRECISION)
        if errors is not None:
            store_rows(errors + head * V, error, first, steps, value, H, V, BT, BV)
        change = error * load_steps(beta, first, steps, head, H, BT)[:, None]
        if changes is not None:
            store_rows(changes + head * V, change, first, steps, value, H, V, BT, BV)
        written = change * load_steps(writes, first, steps, head, H, BT)[:, None]
        state = decayed(state, tl.load(totals + pair), DECAY) + precise_dot(tl.trans(keys), written, HALF, PRECISION)
    if final is not None:
        tl.store(final + at, state, mask=inside)


class Walk(NamedTuple):
    """What a walk along the sequences fills."""

    final: Tensor | None = None  # [N, H, K, V], or [N, H, V, K] with state_v_first
    states: Tensor | None = None  # as `kept_states` has them
    changes: Tensor | None = None  # u [B, T, H, V]
    errors: Tensor | None = None  # e [B, T, H, V]


def walk(chunks: Chunks, x: Systems, w: Walk) -> None:
    """Launch a walk over the sequences of a call."""
    c, index = chunks.call, chunks.index
    key_width, (heads, value_width) = c.k.shape[3], c.v.shape[2:]
    entry = launch.entry("delta_state", c.k, key_width, value_width)
    value_block = launch.block(entry["BV"], value_width)
    launch.run(
        delta_state_kernel,
        c.sequences * heads * triton.cdiv(value_width, value_block),
        c.k, c.v, c.beta, *x,
        c.initial_state, w.states, w.final, w.changes, w.errors, *chunks.by_sequence,
        H=heads, HK=c.k.shape[2], K=key_width, V=value_width, BT=index.size,
        BK=launch.block(entry["key_width"], key_width), BV=value_block, HALF=is_half(c),
        PRECISION=launch.precision(entry), TRANSPOSED=c.state_v_first, DECAY=decay_of(c), **launch.options(entry),
    )


def kept_states(chunks: Chunks, exact: bool = False) -> Tensor:
    """An empty state for each chunk and head in the activations' dtype; in float32 where that is asked for, or where
    it is float16, which could not hold a state.
    """
    c = chunks.call
    shape = (chunks.index.rows, c.v.shape[2], c.k.shape[3], c.v.shape[3])
    dtype = torch.float32 if exact or c.v.dtype is torch.float16 else c.v.dtype
    return torch.empty(shape, dtype=dtype, device=c.v.device)
