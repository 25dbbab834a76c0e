"""gsa: schemas and gradients.

`chunk_gsa` only composes: what its gradient keeps is an output of `chunk_gsa_forward`, so that selective checkpointing
can name it. `fused_recurrent_gsa` keeps nothing but its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_ops.meta import gsa as fake

from ._op import register, register_composite

ACTIVATIONS = ("q", "k", "v")
CONTIGUOUS = (torch.Tag.needs_contiguous_strides,)
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor s, "
SAVED_INPUTS = f"{INPUTS}Tensor? g, Tensor? initial_k, Tensor? initial_v, Tensor? cu_seqlens"
STATES = "Tensor? initial_k=None, Tensor? initial_v=None, bool output_final_state=False"
OFFSETS = "Tensor? cu_seqlens=None, Tensor? cu_seqlens_cpu=None"
FINAL = "Tensor o, Tensor? final_k, Tensor? final_v"
GRADIENTS = "(Tensor? dq, Tensor? dk, Tensor? dv, Tensor? ds, Tensor? dg, Tensor? dinitial_k, Tensor? dinitial_v)"
CHUNK = 64


def _steps(q: Any, v: Any, s: Any) -> tuple[int, int, int, int]:
    """Steps over the query heads and over the state heads, slots, and both widths together."""
    batch, time, query_heads, key_width = q
    return batch * time * query_heads, batch * time * v[2], s[3], key_width + v[3]


def _chunk_flops(q: Any, k: Any, v: Any, s: Any, *_: Any, **__: Any) -> int:
    """Products of queries and keys, slots and values inside a chunk, at each level of halves; states across chunks."""
    reading, writing, slots, widths = _steps(q, v, s)
    inside = CHUNK * (widths + 4 * slots)
    return reading * (inside + 2 * slots * widths) + writing * 2 * slots * widths


def _chunk_backward_flops(q: Any, k: Any, v: Any, s: Any, *_: Any, **__: Any) -> int:
    return 3 * _chunk_flops(q, k, v, s)


def _recurrent_flops(q: Any, k: Any, v: Any, s: Any, *_: Any, **__: Any) -> int:
    """Decay and outer product of both states at each step; a read-out of both for each query head."""
    reading, writing, slots, widths = _steps(q, v, s)
    return (2 * reading + 3 * writing) * slots * widths


def _recurrent_backward_flops(q: Any, k: Any, v: Any, s: Any, *_: Any, **__: Any) -> int:
    return 3 * _recurrent_flops(q, k, v, s)


def _step_flops(q: Any, k: Any, v: Any, s: Any, *_: Any, **__: Any) -> int:
    return int((2 * q[0] * q[1] + 3 * v[0] * v[1]) * s[2] * (q[2] + v[2]))


def _output_gradient(do: Tensor | None, q: Tensor, v: Tensor) -> Tensor:
    """Zeros when only the final states were used."""
    return v.new_zeros((*q.shape[:3], v.shape[3])) if do is None else do


def _keep_chunk(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, s, g, ctx.scale, initial_k, initial_v, _, cu_seqlens, _, ctx.chunk_size, _ = inputs
    kept = output[3:]
    ctx.mark_non_differentiable(*(x for x in kept if x is not None))
    ctx.save_for_backward(q, k, v, s, g, initial_k, initial_v, cu_seqlens, *kept)
    ctx.set_materialize_grads(False)


def _chunk_gradient(
    ctx: Any, do: Tensor | None, dfinal_k: Tensor | None, dfinal_v: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    if do is None and dfinal_k is None and dfinal_v is None:
        return (None,) * 13
    saved = ctx.saved_tensors
    dq, dk, dv, ds, dg, dinitial_k, dinitial_v = torch.ops.fla.chunk_gsa_backward(
        *saved,
        _output_gradient(do, saved[0], saved[2]),
        dfinal_k,
        dfinal_v,
        ctx.scale,
        ctx.chunk_size,
        [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 4, 6, 7)],
    )
    return dq, dk, dv, ds, dg, None, dinitial_k, dinitial_v, None, None, None, None, None


register(
    f"chunk_gsa_forward({INPUTS}Tensor? g=None, float? scale=None, {STATES}, {OFFSETS}, int chunk_size=64, "
    f"int checkpoint_level=2) -> ({FINAL}, Tensor? earlier, Tensor? own, Tensor? states_k, Tensor? states_v)",
    cpu="fla_ops.gsa.cpu.aten:chunk_forward",
    cuda="fla_ops.gsa.gpu.chunk:forward",
    fake=fake.chunk_forward,
    setup_context=_keep_chunk,
    backward=_chunk_gradient,
    cast=ACTIVATIONS,
    flops=_chunk_flops,
    tags=CONTIGUOUS,
)
register(
    f"chunk_gsa_backward({SAVED_INPUTS}, Tensor? earlier, Tensor? own, Tensor? states_k, Tensor? states_v, Tensor do, "
    f"Tensor? dfinal_k, Tensor? dfinal_v, float? scale, int chunk_size, bool[7] output_mask) -> {GRADIENTS}",
    cpu="fla_ops.gsa.cpu.aten:chunk_backward",
    cuda="fla_ops.gsa.gpu.chunk:backward",
    fake=fake.chunk_backward,
    flops=_chunk_backward_flops,
    tags=CONTIGUOUS,
)


def _keep_recurrent(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, s, g, ctx.scale, initial_k, initial_v, _, ctx.reverse, cu_seqlens, _ = inputs
    ctx.save_for_backward(q, k, v, s, g, initial_k, initial_v, cu_seqlens)
    ctx.set_materialize_grads(False)


def _recurrent_gradient(
    ctx: Any, do: Tensor | None, dfinal_k: Tensor | None, dfinal_v: Tensor | None
) -> tuple[Any, ...]:
    if do is None and dfinal_k is None and dfinal_v is None:
        return (None,) * 12
    saved = ctx.saved_tensors
    dq, dk, dv, ds, dg, dinitial_k, dinitial_v = torch.ops.fla.fused_recurrent_gsa_backward(
        *saved,
        _output_gradient(do, saved[0], saved[2]),
        dfinal_k,
        dfinal_v,
        ctx.scale,
        ctx.reverse,
        [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 4, 6, 7)],
    )
    return dq, dk, dv, ds, dg, None, dinitial_k, dinitial_v, None, None, None, None


register(
    f"fused_recurrent_gsa({INPUTS}Tensor? g=None, float? scale=None, {STATES}, bool reverse=False, {OFFSETS}) "
    f"-> ({FINAL})",
    cpu="fla_ops.gsa.cpu.aten_recurrent:forward",
    cuda="fla_ops.gsa.gpu.fused_recurrent:forward",
    fake=fake.recurrent_forward,
    setup_context=_keep_recurrent,
    backward=_recurrent_gradient,
    cast=ACTIVATIONS,
    flops=_recurrent_flops,
    tags=CONTIGUOUS,
)
register(
    f"fused_recurrent_gsa_backward({SAVED_INPUTS}, Tensor do, Tensor? dfinal_k, Tensor? dfinal_v, float? scale, "
    f"bool reverse, bool[7] output_mask) -> {GRADIENTS}",
    cpu="fla_ops.gsa.cpu.aten_recurrent:backward",
    cuda="fla_ops.gsa.gpu.fused_recurrent:backward",
    fake=fake.recurrent_backward,
    flops=_recurrent_backward_flops,
    tags=CONTIGUOUS,
)


register(
    f"gsa_step_({INPUTS}Tensor g, Tensor(a!) state_k, Tensor(b!) state_v, float? scale=None, "
    "Tensor? slots=None) -> Tensor",
    cpu="fla_ops.gsa.cpu.aten_recurrent:step",
    cuda="fla_ops.gsa.gpu.decoding:step",
    fake=fake.step,
    cast=ACTIVATIONS,
    flops=_step_flops,
)
register_composite(
    f"chunk_gsa({INPUTS}Tensor? g=None, float? scale=None, {STATES}, int checkpoint_level=2, {OFFSETS}, "
    f"int chunk_size=64) -> ({FINAL})",
    "fla_ops.gsa.forms:chunk",
)
register_composite(
    f"gsa({INPUTS}Tensor? g=None, float? scale=None, {STATES}, int checkpoint_level=2, {OFFSETS}, int chunk_size=64, "
    f'bool reverse=False, str mode="auto") -> ({FINAL})',
    "fla_ops.gsa.forms:dispatch",
)
