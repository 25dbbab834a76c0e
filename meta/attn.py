"""Shapes and dtypes of the attn operators."""

from __future__ import annotations

import torch

from fla_ops.attn import checks


def parallel_forward(q, k, v, g, scale, window_size, cu_seqlens, chunk_indices, sink_bias, output_rest):
    checks.inputs(q, k, v, g, window_size, cu_seqlens, chunk_indices, sink_bias)
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    shape = (*q.shape[:3], v.shape[3])
    rest = q.new_empty(shape) if output_rest and q.dtype in (torch.bfloat16, torch.float16) else None
    return q.new_empty(shape), q.new_empty(q.shape[:3], dtype=wide), rest


def parallel_backward(q, k, v, g, sink_bias, cu_seqlens, o, lse, rest, do, dlse, scale, window_size, output_mask):
    inputs = (q, k, v, g, sink_bias)
    return tuple(x.new_empty(x.shape) if wanted else None for wanted, x in zip(output_mask, inputs, strict=True))


def decoding(q, k, v, g, scale, cu_seqlens, do_gate_scale, sink_bias, window_size):
    checks.decoding(q, k, v, g, cu_seqlens, sink_bias, window_size)
    return q.new_empty((*q.shape[:3], v.shape[3]))
