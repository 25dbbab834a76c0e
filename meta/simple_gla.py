"""Shapes and dtypes of the simple_gla operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_ops.simple_gla import checks


def state_dtype(x: Tensor) -> torch.dtype:
    """States are carried in float32, or float64 for float64 activations."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, state_v_first: bool) -> tuple[Any, ...]:
    """[N, H, K, V], or [N, H, V, K] with state_v_first."""
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    widths = (q.shape[3], v.shape[3])
    return (sequences, v.shape[2], *(widths[::-1] if state_v_first else widths))


def _forward(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, output_final_state: bool, state_v_first: bool
) -> tuple[Tensor, Tensor | None]:
    state = None
    if output_final_state:
        state = v.new_empty(state_shape(q, v, cu_seqlens, state_v_first), dtype=state_dtype(v))
    return v.new_empty(v.shape), state


def chunk_forward(
    q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size
):
    checks.inputs(q, k, v, g, g_gamma, initial_state, state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size)
    return _forward(q, v, cu_seqlens, output_final_state, state_v_first)


def recurrent_forward(
    q, k, v, g, g_gamma, scale, initial_state, output_final_state, reverse, state_v_first, cu_seqlens, cu_seqlens_cpu
):
    checks.inputs(q, k, v, g, g_gamma, initial_state, state_v_first, cu_seqlens, cu_seqlens_cpu)
    return _forward(q, v, cu_seqlens, output_final_state, state_v_first)


def parallel_forward(q, k, v, g, g_gamma, scale, output_attentions, cu_seqlens, cu_seqlens_cpu):
    checks.inputs(q, k, v, g, g_gamma, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu)
    attn = v.new_empty((v.shape[0], v.shape[2], v.shape[1], v.shape[1])) if output_attentions else None
    return v.new_empty(v.shape), attn


def _gradients(output_mask, *inputs):
    return tuple(x.new_empty(x.shape) if wanted else None for wanted, x in zip(output_mask, inputs, strict=True))


def chunk_backward(
    q, k, v, g, g_gamma, initial_state, cu_seqlens, do, dfinal_state, scale, state_v_first, chunk_size, output_mask
):
    return _gradients(output_mask, q, k, v, g, g_gamma, initial_state)


def recurrent_backward(
    q, k, v, g, g_gamma, initial_state, cu_seqlens, do, dfinal_state, scale, reverse, state_v_first, output_mask
):
    return _gradients(output_mask, q, k, v, g, g_gamma, initial_state)


def parallel_backward(q, k, v, g, g_gamma, cu_seqlens, do, dattn, scale, output_mask):
    return _gradients(output_mask, q, k, v, g, g_gamma)


def step(q, k, v, state, g, g_gamma, scale, slots):
    checks.step(q, k, v, state, g, g_gamma, slots)
    return v.new_empty(v.shape)
