"""The chunk form: the chunks' triangular systems, a walk that carries the state, then one program per chunk and block.

    o_i = scale (exp(P_i) S^T q_i + sum_{j <= i} exp(P_i - P_j) (q_i . k_j) u_j)

The walk leaves the state S before each chunk, and u. The README derives it. Keys and queries are never written as they
are used: their norms become factors of rows and columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fla_ops import launch
from fla_ops.common.gpu.arguments import contiguous, final_state, refuse_float64, refuse_width
from fla_ops.common.gpu.chunk_index import locate_chunk
from fla_ops.common.gpu.decay import block_decay
from fla_ops.common.gpu.tiles import dot, load_rows, split_program, state_tile, store_rows

from .. import checks
from ..call import Call
from .chunk_backward import backward
from .chunks import chunks_of
from .inverses import systems
from .products import inverse_norm, rounded_dot, squared_norm
from .states import Walk, kept_states, walk

__all__ = ["backward", "forward"]


@triton.jit(do_not_specialize=["T", "N"])
def delta_output_kernel(
    q, k, g,                                # [B, T, HK, K] x 2, [B, T, H]
    changes, states, o,                     # [B, T, H, V], [rows, H, K, V], [B, T, H, V]
    scale,
    cu_seqlens, chunk_sequence, chunk_ends, # [N + 1], [rows], [N]
    T, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):
    row, head, block = split_program((V + BV - 1) // BV, H)
    start, length, i = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps = start + i * BT, length - i * BT
    if steps <= 0:
        return
    q += head // (H // HK) * K
    k += head // (H // HK) * K

    scores = tl.zeros([BT, BT], tl.float32)
    out = tl.zeros([BT, BV], tl.float32)
    of_query = tl.zeros([BT], tl.float32)
    of_key = tl.zeros([BT], tl.float32)
    for key in range(0, K, BK):
        queries = load_rows(q, first, steps, key, HK, K, BT, BK)
        keys = load_rows(k, first, steps, key, HK, K, BT, BK)
        at, inside = state_tile(row * H + head, key, block * BV, K, V, BK, BV, False)
        scores += dot(queries, tl.trans(keys), PRECISION)
        out += rounded_dot(queries, tl.load(states + at, mask=inside, other=0.0), queries.dtype, PRECISION)
        of_query += squared_norm(queries)
        of_key += squared_norm(keys)
    decay, enter, _, _ = block_decay(g, first, steps, head, H, BT, DECAY, False)
    scores *= decay * inverse_norm(of_key, NORMALIZE)[None, :]
    written = load_rows(changes + head * V, first, steps, block * BV, H, V, BT, BV)
    out = out * enter[:, None] + rounded_dot(scores, written, written.dtype, PRECISION)
    out *= scale * inverse_norm(of_query, NORMALIZE)[:, None]
    store_rows(o + head * V, out, first, steps, block * BV, H, V, BT, BV)


def forward(c: Call):
    """o [B, T, H, V] in v's dtype, and the final state in float32 or None."""
    checks.eager(c)
    refuse_float64(c.q)
    refuse_width("K", c.q.shape[3])
    c = contiguous(c)
    chunks = chunks_of(c)
    key_width, (heads, value_width) = c.q.shape[3], c.v.shape[2:]
    final = final_state(c)
    changes, o = (torch.empty(c.v.shape, dtype=c.v.dtype, device=c.v.device) for _ in range(2))
    states = kept_states(chunks)
    walk(chunks, systems(chunks), Walk(final, states, changes))
    entry = launch.entry("delta_output", c.q, key_width, value_width)
    key_block, value_block = launch.block(entry["BK"], key_width), launch.block(entry["BV"], value_width)
    launch.run(
        delta_output_kernel,
        chunks.index.rows * heads * triton.cdiv(value_width, value_block),
        c.q, c.k, c.g, changes, states, o, c.factor, *chunks.by_row,
        H=heads, HK=c.q.shape[2], K=key_width, V=value_width, BT=chunks.index.size, BK=key_block, BV=value_block,
        PRECISION=launch.precision(entry), **chunks.flags, **launch.options(entry),
    )
    return o, final
