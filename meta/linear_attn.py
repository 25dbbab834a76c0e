"""Shapes and dtypes of the normalisation of linear_attn."""

from __future__ import annotations

from fla_ops.linear_attn import checks

from .simple_gla import state_dtype


def normalize(q, k, o, scale, initial_z, output_final_z, reverse, cu_seqlens, cu_seqlens_cpu):
    checks.inputs(q, k, o, initial_z, cu_seqlens, cu_seqlens_cpu)
    final_z = None
    if output_final_z:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        final_z = o.new_empty((sequences, 1, o.shape[2], q.shape[3]), dtype=state_dtype(o))
    return o.new_empty(o.shape), final_z


def normalize_backward(q, k, normalized, initial_z, cu_seqlens, dnormalized, dfinal_z, scale, reverse, output_mask):
    inputs = (q, k, normalized, initial_z)
    return tuple(x.new_empty(x.shape) if wanted else None for wanted, x in zip(output_mask, inputs, strict=True))


def normalize_step(q, k, o, z, scale, slots):
    checks.step(q, k, o, z, slots)
    return o.new_empty(o.shape)
