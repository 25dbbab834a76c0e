"""Gradients of the chunk form: what the forward pass did not keep is computed again, then its two products run with
other roles.

    dp_i = sum_j (do_i . v_j) W_ij s_j + exp(P_i) C do_i               spread, from (do, v, s, C^T)
    dq_i = sum_j (sum_m dx_im W_ijm s_jm) k_j + A (exp(P_i) dx_i)      contract, from (dx, s, k, A)
    dv_j = sum_i (sum_m s_jm W_ijm p_im) do_i + dC^T (b_j s_j)         contract in reverse, summed over the group
    dk_j = sum_i (sum_m s_jm W_ijm dx_im) q_i + dA (b_j s_j)           contract in reverse, summed over the group
    ds_j = sum_i (v_j . do_i) W_ij p_i + b_j dC v_j + sum_i (k_j . q_i) W_ij dx_i + b_j dA^T k_j

with b_j the decay from step j to the chunk's end and the scale in dx. dg_t gathers what passes the gate of step t.
Inside the chunk: what the steps from t on read from earlier ones, p dp + x dx without the term of the step itself,
less what later steps read from them, s ds likewise. Past its end: s_j times what step j < t gives to the next state's
gradient, and d <A, dA> + d <C, dC>. Nothing accumulates along the sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import contiguous, scale_of
from fla_ops.common.gpu.chunk_index import ChunkIndex, locate_chunk
from fla_ops.common.gpu.tiles import load_rows, split_program, state_tile, store_rows

from .. import checks
from .abc_gates import slot_gates, slot_gates_gradient
from .levels import diagonal, load_log_decays, spread_levels, sum_before, to_end
from .products import across_chunks, contract, levels, scores_of, sequences_in, spread
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
    """The slots' gradient from later steps, from the step itself, from past the chunk's end, [BT, BM]; <X, dX> of each
    slot, [BM].
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


def backward(
    q, k, v, s, g, initial_k, initial_v, cu_seqlens, earlier, own, states_k, states_v, do, dfinal_k, dfinal_v, scale,
    chunk_size, output_mask,
):
    """The gradients that output_mask asks for (q, k, v, s, g and the states), each in its input's dtype."""
    slots, wanted, gated = s, checks.mask(g, output_mask), g is not None
    q, k, v, s, g, do, cu_seqlens = contiguous(q, k, v, s, g, do, cu_seqlens)
    initial_k, initial_v, dfinal_k, dfinal_v = contiguous(initial_k, initial_v, dfinal_k, dfinal_v)
    s, g = (s, g) if gated else slot_gates(s, cu_seqlens)
    need_q, need_k, need_v, need_s, need_g, need_first, need_second = wanted
    scale, index = scale_of(q, scale), chunk_index.build(*q.shape[:2], cu_seqlens, checks.chunk_steps(q, chunk_size))
    if states_k is None:
        states_k = channel_states(index, k, s, g, initial_k, None, cu_seqlens, False)
        states_v = channel_states(index, v, s, g, initial_v, None, cu_seqlens, True)
    if earlier is None:
        earlier, own = spread(index, q, k, s, g, states_k, cu_seqlens, False, scale)
    dearlier, down = spread(index, do, v, s, g, states_v, cu_seqlens, True)
    p, dx, reads = softmax_gradient(earlier, own, dearlier, down, s, scale, need_g)

    ds = torch.empty_like(s) if need_s else None
    dg = torch.empty_like(g) if need_g else None
    dq, dk, dv = (torch.empty_like(x) if need else None for x, need in ((q, need_q), (k, need_k), (v, need_v)))
    dinitial_k = torch.empty_like(initial_k) if need_first else None
    dinitial_v = torch.empty_like(initial_v) if need_second else None
    written = need_s or need_g
    dstates_k = dstates_v = None
    if need_k or written or need_first:
        dstates_k = channel_states(
            index, q, dx, g, dfinal_k, dinitial_k, cu_seqlens, False, reverse=True, keep=need_k or written
        )
    if need_v or written or need_second:
        dstates_v = channel_states(
            index, do, p, g, dfinal_v, dinitial_v, cu_seqlens, True, reverse=True, keep=need_v or written
        )
    if need_q:
        contract(index, dx, s, k, g, states_k, cu_seqlens, False, dq)
    if need_k:
        contract(index, s, dx, q, g, dstates_k, cu_seqlens, False, dk, reverse=True)
    if need_v:
        contract(index, s, p, do, g, dstates_v, cu_seqlens, True, dv, reverse=True)
    if written:
        states = (states_k, dstates_k, states_v, dstates_v)
        slot_gradient(index, (q, k, v, s, g, do, p, dx, reads), states, ds, dg, cu_seqlens)
    if not gated:
        ds, dg = slot_gates_gradient(s, g, cu_seqlens, ds, dg, slots.dtype) if need_s else None, None
    return dq, dk, dv, ds, dg, dinitial_k, dinitial_v


def slot_gradient(
    index: ChunkIndex,
    activations: tuple[Tensor | None, ...],
    states: tuple[Tensor | None, ...],
    ds: Tensor | None,
    dg: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Fills ds and dg [B, T, H, M], where given, from q, k, v, s, g, do, p, dx and reads."""
    q, k, v, s = activations[:4]
    heads, slots = s.shape[2:]
    widest = max(k.shape[3], v.shape[3])
    entry = launch.entry("slot_gradient", q, widest, slots)
    width_block, slot_block = launch.block(entry["BU"], widest), launch.block(entry["BM"], slots)
    launch.run(
        slot_gradient_kernel,
        index.rows * heads * triton.cdiv(slots, slot_block),
        *activations, *states, ds, dg, cu_seqlens, index.sequence, index.ends, q.shape[1], sequences_in(cu_seqlens),
        H=heads, GROUP=q.shape[2] // heads, K=k.shape[3], V=v.shape[3], M=slots,
        BT=index.size, BU=width_block, BM=slot_block, LEVELS=levels(index),
        PRECISION=launch.precision(entry), **launch.options(entry),
    )
