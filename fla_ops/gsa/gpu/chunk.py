"""The chunk form: passes that carry both states from chunk to chunk, then two products for all chunks at once, the
softmax between them.

    x_i = scale (sum_{j <= i} (q_i . k_j) W_ij s_j + exp(P_i) A^T q_i)          value-gated; W_ijm = exp(P_im - P_jm)
    o_i = sum_{j <= i} (sum_m softmax(x_i)_m W_ijm s_jm) v_j + C^T (exp(P_i) softmax(x_i))                 key-gated

x is written once, in float32 and without the term of step i itself; the second product takes the softmax as it reads
it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.common.gpu.arguments import contiguous, refuse_float64

from .. import checks
from ..call import Call, Kept
from .abc_gates import with_gates
from .chunk_backward import backward
from .chunks import chunks_of
from .products import key_gated, value_gated
from .states import channel_states

__all__ = ["backward", "forward"]


def forward(c: Call) -> Kept:
    """The outputs, the final states, and what the gradient keeps: the argument of the softmax up to level 1 of
    checkpoint_level, the states before each chunk at level 0.
    """
    checks.eager(c)
    refuse_float64(c.q)
    c = with_gates(contiguous(c))
    q, k, v, s = c[:4]
    chunks = chunks_of(c)
    final_k, final_v = final_states(c)
    states_k = channel_states(chunks, k, s, c.initial_k, final_k, transposed=False)
    states_v = channel_states(chunks, v, s, c.initial_v, final_v, transposed=True)
    earlier, own = value_gated(chunks, q, k, s, states_k, transposed=False, scale=c.factor)
    o = v.new_empty((*q.shape[:3], v.shape[3]))
    key_gated(chunks, earlier, s, v, states_v, transposed=True, y=o, diagonal=own)
    argument = (earlier, own) if c.checkpoint_level < 2 else (None, None)
    states = (states_k, states_v) if c.checkpoint_level < 1 else (None, None)
    return Kept(o, final_k, final_v, *argument, *states)


def final_states(c: Call) -> tuple[Tensor | None, ...]:
    """Both final states, empty and in float32, if the call asks for them."""
    return tuple(
        torch.empty(shape, dtype=torch.float32, device=c.v.device) if c.output_final_state else None
        for shape in c.state_shapes
    )
