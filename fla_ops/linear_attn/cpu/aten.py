"""The normalisation on a CPU: o_t / (scale q_t . z_t + 1e-10), z_t the running sum of k."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import pools
from fla_ops.common.cpu.chunks import Chunks, DenseChunks, PackedChunks

from .. import checks
from . import chunked

CHUNK = 64


def forward(q, k, o, scale, initial_z, output_final_z, reverse, cu_seqlens, cu_seqlens_cpu):
    """The quotient [B, T, H, V] in o's dtype, and the last z [N, 1, H, K] in the carried dtype."""
    checks.launch(q, k, o, initial_z, cu_seqlens, cu_seqlens_cpu)
    return chunked.forward(_layout(q, cu_seqlens), q, k, o, scale, initial_z, output_final_z, reverse)


def backward(q, k, normalized, initial_z, cu_seqlens, dnormalized, dfinal_z, scale, reverse, output_mask):
    """The gradients of q, k, o and initial_z that output_mask asks for."""
    layout = _layout(q, cu_seqlens)
    return chunked.backward(layout, q, k, normalized, initial_z, dnormalized, dfinal_z, scale, reverse, output_mask)


def step(q, k, o, z, scale, slots):
    """One step for N sequences: rows of z updated in place."""
    checks.launch_step(q, k, o, z, slots)
    pool = z.squeeze(1)
    rows = list(range(len(q))) if slots is None else valid.slot_values(slots, len(pool))
    y = torch.zeros_like(o, memory_format=torch.contiguous_format)
    for some, at in pools.blocks(rows, pool.shape[1] * pool.shape[2]):
        y[some], sums = _advance(q[some], k[some], o[some], pool[at], scale)
        pool[at] = sums.to(pool.dtype)
    return y


def _advance(q, k, o, z, scale):
    """The quotients [n, H, V] in o's dtype and the sums [n, H, K] after one step, from the sums before it."""
    dtype, group = chunked.compute_dtype(o), o.shape[1] // q.shape[1]
    queries, keys = (x.to(dtype).repeat_interleave(group, 1) if group > 1 else x.to(dtype) for x in (q, k))
    sums = z.to(dtype) + keys
    denominator = torch.linalg.vecdot(queries, sums).unsqueeze(-1).mul_(chunked.scale_of(q, scale))
    return (o / denominator.add_(chunked.EPSILON)).to(o.dtype).contiguous(), sums


def _layout(q: Tensor, cu_seqlens: Tensor | None) -> Chunks:
    """Chunks of 64 steps, or one shorter chunk for a short batch."""
    if cu_seqlens is not None:
        return PackedChunks(valid.cu_seqlens_values(cu_seqlens, q.shape[1]), CHUNK, q.device)
    batch, time = q.shape[:2]
    return DenseChunks(batch, time, min(CHUNK, 1 << max(time - 1, 0).bit_length()))
