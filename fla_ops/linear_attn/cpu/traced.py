"""The normalisation as a body that can be traced with symbolic sizes: what compiled CPU code may hold."""

from __future__ import annotations

from torch import Tensor

from fla_ops.common.cpu.traced_chunks import TracedDense, TracedPacked

from . import chunked

CHUNK = 64


def forward(q, k, o, scale, initial_z, output_final_z, reverse, cu_seqlens, cu_seqlens_cpu):
    """The quotient and the last z."""
    return chunked.forward(_layout(q, cu_seqlens), q, k, o, scale, initial_z, output_final_z, reverse)


def backward(q, k, normalized, initial_z, cu_seqlens, dnormalized, dfinal_z, scale, reverse, output_mask):
    """The gradient of forward."""
    layout = _layout(q, cu_seqlens)
    return chunked.backward(layout, q, k, normalized, initial_z, dnormalized, dfinal_z, scale, reverse, output_mask)


def _layout(q: Tensor, cu_seqlens: Tensor | None) -> TracedDense | TracedPacked:
    if cu_seqlens is None:
        return TracedDense(q.shape[0], q.shape[1], CHUNK)
    return TracedPacked(cu_seqlens, q.shape[1], CHUNK)
