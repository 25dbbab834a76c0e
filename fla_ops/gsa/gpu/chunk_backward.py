"""Gradients of the chunk form: what the forward pass did not keep is computed again, then its two products run with
other roles.

    dp_i = sum_j (do_i . v_j) W_ij s_j + exp(P_i) C do_i               value-gated, from (do, v, s, C^T)
    dq_i = sum_j (sum_m dx_im W_ijm s_jm) k_j + A (exp(P_i) dx_i)      key-gated, from (dx, s, k, A)
    dv_j = sum_i (sum_m s_jm W_ijm p_im) do_i + dC^T (b_j s_j)         key-gated in reverse, summed over the group
    dk_j = sum_i (sum_m s_jm W_ijm dx_im) q_i + dA (b_j s_j)           key-gated in reverse, summed over the group
    ds_j = sum_i (v_j . do_i) W_ij p_i + b_j dC v_j + sum_i (k_j . q_i) W_ij dx_i + b_j dA^T k_j

with b_j the decay from step j to the chunk's end and the scale in dx. Let x', dp' and ds' be these sums without the
term i = j, y_j what step j gives to the next states, b_j (dC v_j + dA^T k_j), and d the decay of the whole chunk:

    dg_t = sum_{i >= t} (p_i dp'_i + x'_i dx_i - s_i ds'_i) + sum_{j < t} s_j y_j + d (<A, dA> + <C, dC>)

Nothing accumulates along the sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.arguments import contiguous
from fla_ops.common.gpu.chunk_index import locate_chunk
from fla_ops.common.gpu.tiles import load_rows, split_program, state_tile, store_rows

from ..call import Call, Gradients, Kept, Need, Outputs
from .abc_gates import of_inputs, with_gates
from .chunks import Chunks, chunks_of
from .levels import diagonal, load_log_decays, spread_levels, sum_before, to_end
from .products import across_chunks, key_gated, scores_of, value_gated
from .softmax_gradient import softmax_gradient
from .states import channel_states


@triton.jit
def written_in_one_pass(
    u, a, r, log_decay,                     # at one head of [time, H, U], [time, HQ, U], [time, HQ, M]; [BT, BM]
    states, dstates,                        # [rows, H, U, M] or TRANSPOSED
    matrix, first, steps, slot,
    H: tl.constexpr, GROUP: tl.constexpr, U: tl.constexpr, M: tl.constexpr,
    BT: tl.constexpr, BU: tl.constexpr, BM: tl.constexpr, LEVELS: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):
    """The slots' gradient from later steps, from the step itself and from past the chunk's end, each [BT, BM].

    The last result is <X, dX> of each slot, [BM].
    """
    HQ: tl.constexpr = H * GROUP
    later = tl.zeros([BT, BM], tl.float32)
    own = tl.zeros([BT, BM], tl.float32)
    for j in range(GROUP):
        scores = scores_of(u, a + j * U, first, steps, H, HQ, U, BT, BU, PRECISION)
        readers = load_rows(r + j * M, first, steps, slot, HQ, M, BT, BM)
        later += spread_levels(scores, readers, log_decay, BT, BM, LEVELS, True, PRECISION)
        own += diagonal(scores, BT)[:, None] * readers
    past = across_chunks(u, dstates, matrix, first, steps, slot, H, U, M, BT, BU, BM, TRANSPOSED, PRECISION)
    carried = tl.zeros([BM], tl.float32)
    for width in range(0, U, BU):
        at, inside = state_tile(matrix, width, slot, U, M, BU, BM, TRANSPOSED)
        state = tl.load(states + at, mask=inside, other=0.0)
        carried += tl.sum(state * tl.load(dstates + at, mask=inside, other=0.0), 0)
    return later, own, past, carried


@triton.jit(do_not_specialize=["T", "N"])
def slot_gradient_kernel(
    q, k, v, s, g, do,                      # [B, T, HQ, K], [B, T, H, K], [B, T, H, V], [B, T, H, M] x 2, [B, T, HQ, V]
    p, dx, reads,                           # [B, T, HQ, M] x 2, [B, T, H, M]
    states_k, dstates_k,                    # [rows, H, K, M]
    states_v, dstates_v,                    # [rows, H, M, V]
    ds, dg,                                 # [B, T, H, M]
    cu_seqlens, chunk_sequence, chunk_ends,     # [N + 1], [rows], [N]
    T, N,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    BT: tl.constexpr, BU: tl.constexpr, BM: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):
    row, head, block = split_program((M + BM - 1) // BM, H)
    start, length, i = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps, slot, matrix = start + i * BT, length - i * BT, block * BM, row * H + head
    if steps <= 0:
        return
    query = head * GROUP
    log_decay = load_log_decays(g + head * M, first, steps, slot, H, M, BT, BM)
    later, own, past, carried = written_in_one_pass(
        v + head * V, do + query * V, p + query * M, log_decay, states_v, dstates_v, matrix, first, steps, slot,
        H, GROUP, V, M, BT, BU, BM, LEVELS, True, PRECISION,
    )
    later_k, own_k, past_k, carried_k = written_in_one_pass(
        k + head * K, q + query * K, dx + query * M, log_decay, states_k, dstates_k, matrix, first, steps, slot,
        H, GROUP, K, M, BT, BU, BM, LEVELS, False, PRECISION,
    )
    past = (past + past_k) * to_end(g + head * M, first, steps, slot, H, M, BT, BM)
    later, carried = later + later_k, carried + carried_k
    if ds is not None:
        store_rows(ds + head * M, later + own + own_k + past, first, steps, slot, H, M, BT, BM)
    if dg is not None:
        slots = load_rows(s + head * M, first, steps, slot, H, M, BT, BM).to(tl.float32)
        inside = load_rows(reads + head * M, first, steps, slot, H, M, BT, BM) - slots * later
        dlog_decay = tl.cumsum(inside, 0, reverse=True) + sum_before(slots * past, BT, BM, LEVELS)
        dlog_decay += (tl.exp2(tl.sum(log_decay, 0)) * carried)[None, :]
        dlog_decay = tl.where(tl.exp2(log_decay) == 0.0, 0.0, dlog_decay)
        store_rows(dg + head * M, dlog_decay, first, steps, slot, H, M, BT, BM)


def backward(c: Call, d: Outputs, need: Need, saved: Kept) -> Gradients:
    """The gradients that are needed, each in its input's dtype."""
    inside, given, d = need.of_gates(c.g), contiguous(c), contiguous(d)
    c = with_gates(given)
    q, k, v, s = c[:4]
    chunks = chunks_of(c)
    earlier, own, states_k, states_v = saved[3:]
    if states_k is None:
        states_k = channel_states(chunks, k, s, c.initial_k, None, transposed=False)
        states_v = channel_states(chunks, v, s, c.initial_v, None, transposed=True)
    if earlier is None:
        earlier, own = value_gated(chunks, q, k, s, states_k, transposed=False, scale=c.factor)
    dearlier, down = value_gated(chunks, d.o, v, s, states_v, transposed=True)
    p, dx, reads = softmax_gradient((earlier, own), (dearlier, down), s, c.factor, inside.g)

    found = Gradients._make(torch.empty_like(getattr(c, x)) if getattr(inside, x) else None for x in need._fields)
    slots_needed = inside.s or inside.g
    dstates_k = dstates_v = None
    if need.k or slots_needed or need.initial_k:
        keep = need.k or slots_needed
        dstates_k = channel_states(chunks, q, dx, d.final_k, found.initial_k, False, reverse=True, keep=keep)
    if need.v or slots_needed or need.initial_v:
        keep = need.v or slots_needed
        dstates_v = channel_states(chunks, d.o, p, d.final_v, found.initial_v, True, reverse=True, keep=keep)
    if need.q:
        key_gated(chunks, dx, s, k, states_k, transposed=False, y=found.q)
    if need.k:
        key_gated(chunks, s, dx, q, dstates_k, transposed=False, y=found.k, reverse=True)
    if need.v:
        key_gated(chunks, s, p, d.o, dstates_v, transposed=True, y=found.v, reverse=True)
    if slots_needed:
        states = (states_k, dstates_k, states_v, dstates_v)
        slot_gradient(chunks, (q, k, v, s, c.g, d.o, p, dx, reads), states, found.s, found.g)
    return of_inputs(given, c, need, found)


def slot_gradient(
    chunks: Chunks,
    activations: tuple[Tensor | None, ...],
    states: tuple[Tensor | None, ...],
    ds: Tensor | None,
    dg: Tensor | None,
) -> None:
    """Fill ds and dg [B, T, H, M], where given, from q, k, v, s, g, do, p, dx and reads."""
    q, k, v = activations[:3]
    (_, time, heads, slots), index = chunks.g.shape, chunks.index
    widest = max(k.shape[3], v.shape[3])
    entry = launch.entry("slot_gradient", q, widest, slots)
    width_block, slot_block = launch.block(entry["BU"], widest), launch.block(entry["BM"], slots)
    launch.run(
        slot_gradient_kernel,
        index.rows * heads * triton.cdiv(slots, slot_block),
        *activations, *states, ds, dg, chunks.cu_seqlens, index.sequence, index.ends, time, chunks.packed,
        H=heads, GROUP=q.shape[2] // heads, K=k.shape[3], V=v.shape[3], M=slots,
        BT=index.size, BU=width_block, BM=slot_block, LEVELS=chunks.levels,
        PRECISION=launch.precision(entry), **launch.options(entry),
    )
