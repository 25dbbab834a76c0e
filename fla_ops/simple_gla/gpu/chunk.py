"""The chunk form: a pass that carries the state from chunk to chunk, then one program per chunk, head and value block.

    o_i = scale (sum_{j <= i} D_ij (q_i . k_j) v_j + a_i S^T q_i)

D_ij is the decay from step j to step i, a_i from the chunk's start to step i, S the state before the chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import contiguous, final_state, packed_sequences, refuse_float64
from fla_ops.common.gpu.chunk_index import locate_chunk, sequence_of
from fla_ops.common.gpu.decay import block_decay, gate
from fla_ops.common.gpu.tiles import dot, dot_state, load_rows, nearest, split_program, state_tile, store_rows

from .. import checks
from ..call import Call, Outputs, Prefill, Record, Recorded
from ..stopping import stopped
from .chunk_backward import backward
from .chunk_states import Ends, chunk_states, ends_of
from .pools import instead, slot_of

__all__ = ["backward", "forward", "prefill", "record"]


@triton.jit(do_not_specialize=["T", "N", "P"])
def chunk_output_kernel(
    q, k, v, g,                             # [B, T, HK, K] x 2, [B, T, H, V], [B, T, H] or [H]
    states, o,                              # [rows, H, K, V], [B, T, H, V]
    cu_seqlens, chunk_sequence, chunk_ends, slots,  # [N + 1], [rows], [N], [N]
    scale, T, N, P,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):
    row, head, block = split_program((V + BV - 1) // BV, H)
    start, length, i = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps = start + i * BT, length - i * BT
    if steps <= 0:
        return
    q += head // (H // HK) * K
    k += head // (H // HK) * K
    v += head * V
    o += head * V
    if slots is not None:
        slot = slot_of(slots, sequence_of(row, chunk_sequence, T, BT))
        if (slot < 0) | (slot >= P):
            store_rows(o, tl.zeros([BT, BV], tl.float32) + instead(slot), first, steps, block * BV, H, V, BT, BV)
            return

    scores = tl.zeros([BT, BT], tl.float32)
    out = tl.zeros([BT, BV], tl.float32)
    for key in range(0, K, BK):
        queries = load_rows(q, first, steps, key, HK, K, BT, BK)
        keys = load_rows(k, first, steps, key, HK, K, BT, BK)
        at, inside = state_tile(row * H + head, key, block * BV, K, V, BK, BV, False)
        scores += dot(queries, tl.trans(keys), PRECISION)
        out += dot_state(queries, tl.load(states + at, mask=inside, other=0.0), PRECISION)
    decay, from_start, _, _ = block_decay(g, first, steps, head, H, BT, DECAY, False)
    values = load_rows(v, first, steps, block * BV, H, V, BT, BV)
    out = out * from_start[:, None] + dot(nearest(scores * decay, values.dtype), values, PRECISION)
    store_rows(o, out * scale, first, steps, block * BV, H, V, BT, BV)


def forward(c: Call):
    """o [B, T, H, V] in v's dtype, and the final state in float32 or None."""
    checks.eager(c)
    refuse_float64(c.q)
    if c.reverse:
        return Outputs(*forward(c.turned())).turned(packed=c.cu_seqlens is not None)
    c = contiguous(c)
    final = final_state(c)
    return _outputs(c, Ends(c.initial_state, final)), final


def prefill(c: Prefill):
    """o [B, T, H, V] in v's dtype; row slots[n] of the pool goes from the initial to the final state of sequence n."""
    checks.eager_prefill(c)
    refuse_float64(c.q)
    c = contiguous(c, but=("state",))
    return _outputs(c.call(), ends_of(c))


def record(c: Record):
    """o where there are queries, and in float32 the states on the way and the final ones."""
    checks.eager_record(c)
    if c.at is not None:
        return stopped(c, record)
    refuse_float64(c.k)
    call = contiguous(c.call())
    final = final_state(call)
    fill = torch.empty if c.cu_seqlens is None else torch.zeros  # packed sequences may leave rows unused
    kept = fill((c.rows, *call.state_shape[1:]), dtype=torch.float32, device=c.v.device)
    o = _outputs(call, Ends(call.initial_state, final, kept, c.every), read=c.q is not None)
    return Recorded(o, kept, final)


def _outputs(c: Call, ends: Ends, read: bool = True) -> Tensor | None:
    """o, if it is to be read, from states to states that are left where `ends` says; all tensors are contiguous but a
    pool.
    """
    q, k, v, cu_seqlens = c.q, c.k, c.v, c.cu_seqlens
    batch, time, key_heads, key_width = q.shape
    heads, value_width = v.shape[2:]
    decay = gate(c)
    entry = launch.entry("chunk_output", q, key_width, value_width)
    index = chunk_index.build(batch, time, cu_seqlens, min(c.chunk_size, entry["BT"]))
    states = chunk_states(index, c, k, v, ends, keep=read)
    if not read:
        return None
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    key_block, value_block = launch.block(entry["BK"], key_width), launch.block(entry["BV"], value_width)
    launch.run(
        chunk_output_kernel,
        index.rows * heads * triton.cdiv(value_width, value_block),
        q, k, v, decay[0], states, o, cu_seqlens, index.sequence, index.ends, ends.slots,
        c.factor, time, packed_sequences(cu_seqlens), ends.rows,
        H=heads, HK=key_heads, K=key_width, V=value_width, BT=index.size, BK=key_block, BV=value_block,
        DECAY=decay[1], PRECISION=launch.precision(entry), **launch.options(entry),
    )
    return o
