"""Shapes and dtypes of the gsa operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.gsa import checks


def state_dtype(x: Tensor) -> torch.dtype:
    """States, and the argument of the softmax, are float32, or float64 for float64 activations."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _outputs(
    q: Tensor, v: Tensor, s: Tensor, cu_seqlens: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    o = v.new_empty((*q.shape[:3], v.shape[3]))
    if not output_final_state:
        return o, None, None
    lead = (q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, v.shape[2])
    widths = (q.shape[3], s.shape[3], v.shape[3])
    state_k, state_v = (v.new_empty((*lead, *widths[i : i + 2]), dtype=state_dtype(v)) for i in (0, 1))
    return o, state_k, state_v


def chunk_forward(
    q, k, v, s, g, scale, initial_k, initial_v, output_final_state, cu_seqlens, cu_seqlens_cpu, chunk_size,
    checkpoint_level,
):  # fmt: skip
    checks.inputs(q, k, v, s, g, initial_k, initial_v, cu_seqlens, cu_seqlens_cpu, chunk_size, checkpoint_level)
    earlier = own = states_k = states_v = None
    if checkpoint_level < 2:
        earlier = v.new_empty((*q.shape[:3], s.shape[3]), dtype=state_dtype(v))
        own = v.new_empty(q.shape[:3], dtype=state_dtype(v))
    if checkpoint_level < 1:
        lead = (checks.chunk_rows(q, cu_seqlens, chunk_size), v.shape[2])
        states_k = v.new_empty((*lead, q.shape[3], s.shape[3]), dtype=state_dtype(v))
        states_v = v.new_empty((*lead, s.shape[3], v.shape[3]), dtype=state_dtype(v))
    return *_outputs(q, v, s, cu_seqlens, output_final_state), earlier, own, states_k, states_v


def recurrent_forward(
    q, k, v, s, g, scale, initial_k, initial_v, output_final_state, reverse, cu_seqlens, cu_seqlens_cpu
):
    checks.inputs(q, k, v, s, g, initial_k, initial_v, cu_seqlens, cu_seqlens_cpu)
    return _outputs(q, v, s, cu_seqlens, output_final_state)


def _gradients(output_mask, *inputs):
    return tuple(x.new_empty(x.shape) if wanted else None for wanted, x in zip(output_mask, inputs, strict=True))


def chunk_backward(
    q, k, v, s, g, initial_k, initial_v, cu_seqlens, earlier, own, states_k, states_v, do, dfinal_k, dfinal_v, scale,
    chunk_size, output_mask,
):  # fmt: skip
    return _gradients(output_mask, q, k, v, s, g, initial_k, initial_v)


def recurrent_backward(
    q, k, v, s, g, initial_k, initial_v, cu_seqlens, do, dfinal_k, dfinal_v, scale, reverse, output_mask
):
    return _gradients(output_mask, q, k, v, s, g, initial_k, initial_v)


def step(q, k, v, s, g, state_k, state_v, scale, slots):
    checks.step(q, k, v, s, g, state_k, state_v, slots)
    return v.new_empty((*q.shape[:2], v.shape[2]))
