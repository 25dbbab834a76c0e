"""simple_gla as a body that can be traced with symbolic sizes: what stands in for the operator in compiled CPU code."""

from __future__ import annotations

from torch import Tensor

from fla_ops.common.cpu.traced_chunks import TracedDense, TracedPacked

from . import chunked


def forward(
    q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size
):
    """The chunk form; the fused form shares it, since a walk over chunks cannot be traced without fixing T."""
    layout = _layout(q, cu_seqlens, chunk_size)
    written = chunked.cut(layout, k, v, g, g_gamma)
    o, final = chunked.forward(layout, q, written, scale, initial_state, output_final_state, state_v_first)
    return layout.join(o, v.dtype), final


def backward(
    q, k, v, g, g_gamma, initial_state, cu_seqlens, do, dfinal_state, scale, state_v_first, chunk_size, output_mask
):
    """The gradient of forward."""
    layout = _layout(q, cu_seqlens, chunk_size)
    written, leave = chunked.cut(layout, k, v, g, g_gamma), chunked.joining(layout, q, k, v)
    gates, states = (g, g_gamma), (initial_state, do, dfinal_state)
    return chunked.backward(layout, q, written, *gates, *states, scale, state_v_first, output_mask, leave)


def _layout(q: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> TracedDense | TracedPacked:
    if cu_seqlens is None:
        return TracedDense(q.shape[0], q.shape[1], chunk_size)
    return TracedPacked(cu_seqlens, q.shape[1], chunk_size)
