"""The chunk form: passes that carry both states from chunk to chunk, then two products for all chunks at once, the
softmax between them.

    x_i = scale (sum_{j <= i} (q_i . k_j) W_ij s_j + exp(P_i) A^T q_i)          W_ijm = exp(P_im - P_jm)
    o_i = sum_{j <= i} (sum_m softmax(x_i)_m W_ijm s_jm) v_j + C^T (exp(P_i) softmax(x_i))

x is written once, in float32 and without the term of step i itself; the second product takes the softmax as it reads
it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import check_offsets, contiguous, refuse_float64, scale_of

from .. import checks
from .abc_gates import slot_gates
from .chunk_backward import backward as backward
from .products import contract, spread
from .states import channel_states


def forward(
    q, k, v, s, g, scale, initial_k, initial_v, output_final_state, cu_seqlens, cu_seqlens_cpu, chunk_size,
    checkpoint_level,
):
    """o, the final states, and what the gradient keeps: `earlier` and `own` up to level 1, the chunks' states at level
    0.
    """
    checks.launch(q, k, v, s, g, initial_k, initial_v, cu_seqlens, cu_seqlens_cpu, chunk_size, checkpoint_level)
    refuse_float64(q)
    check_offsets(cu_seqlens, q.shape[1])
    q, k, v, s, g, initial_k, initial_v, cu_seqlens = contiguous(q, k, v, s, g, initial_k, initial_v, cu_seqlens)
    s, g = slot_gates(s, cu_seqlens) if g is None else (s, g)
    index = chunk_index.build(*q.shape[:2], cu_seqlens, checks.chunk_steps(q, chunk_size))

    final_k, final_v = final_states(q, v, s, cu_seqlens) if output_final_state else (None, None)
    states_k = channel_states(index, k, s, g, initial_k, final_k, cu_seqlens, False)
    states_v = channel_states(index, v, s, g, initial_v, final_v, cu_seqlens, True)
    earlier, own = spread(index, q, k, s, g, states_k, cu_seqlens, False, scale_of(q, scale))
    o = v.new_empty((*q.shape[:3], v.shape[3]))
    contract(index, earlier, s, v, g, states_v, cu_seqlens, True, o, own=own)
    return (
        o,
        final_k,
        final_v,
        *((earlier, own) if checkpoint_level < 2 else (None, None)),
        *((states_k, states_v) if checkpoint_level < 1 else (None, None)),
    )


def final_states(q: Tensor, v: Tensor, s: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Empty final states, [N, H, K, M] and [N, H, M, V], float32."""
    lead = (q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, v.shape[2])
    first, second = (
        torch.empty(*lead, *widths, dtype=torch.float32, device=v.device)
        for widths in ((q.shape[3], s.shape[3]), (s.shape[3], v.shape[3]))
    )
    return first, second
