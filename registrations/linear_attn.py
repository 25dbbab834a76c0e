"""linear_attn: the normalisation is an operator with a gradient, all else composes it with simple_gla's operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fla_ops.meta import linear_attn as fake

from ._op import register, register_composite

CONTIGUOUS = (torch.Tag.needs_contiguous_strides,)


def _flops(q: Any, k: Any, o: Any, *_: Any, **__: Any) -> int:
    """Sum, product and quotient, of one step or of all: they are far fewer than the numerator's."""
    rows: int = math.prod(o[:-1])
    return rows * (3 * int(q[-1]) + int(o[-1]))


def _backward_flops(q: Any, k: Any, o: Any, *_: Any, **__: Any) -> int:
    """The denominator again, its gradient, and two running sums."""
    rows: int = math.prod(o[:-1])
    return rows * (7 * int(q[-1]) + 3 * int(o[-1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, _, ctx.scale, initial_z, _, ctx.reverse, cu_seqlens, _ = inputs
    normalized, _ = output
    ctx.save_for_backward(q, k, normalized, initial_z, cu_seqlens)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dnormalized: Tensor | None, dfinal_z: Tensor | None) -> tuple[Any, ...]:
    if dnormalized is None and dfinal_z is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    if dnormalized is None:
        dnormalized = torch.zeros_like(saved[2])
    mask = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    dq, dk, do, dinitial_z = torch.ops.fla.normalize_output_backward(
        *saved, dnormalized, dfinal_z, ctx.scale, ctx.reverse, mask
    )
    return dq, dk, do, None, dinitial_z, None, None, None, None


register(
    "normalize_output(Tensor q, Tensor k, Tensor o, float? scale=1.0, Tensor? initial_z=None, "
    "bool output_final_z=False, bool reverse=False, Tensor? cu_seqlens=None, Tensor? cu_seqlens_cpu=None) -> "
    "(Tensor normalized, Tensor? final_z)",
    cpu="fla_ops.linear_attn.cpu.cpp:forward",
    cuda="fla_ops.linear_attn.gpu.normalize:forward",
    fake=fake.normalize,
    setup_context=_keep,
    backward=_gradient,
    cast=("q", "k", "o"),
    flops=_flops,
    inline={"cpu": "fla_ops.linear_attn.cpu.traced:forward", "cuda": "fla_ops.linear_attn.gpu.normalize:forward"},
    tags=CONTIGUOUS,
)
register(
    "normalize_output_backward(Tensor q, Tensor k, Tensor normalized, Tensor? initial_z, Tensor? cu_seqlens, "
    "Tensor dnormalized, Tensor? dfinal_z, float? scale, bool reverse, bool[4] output_mask) -> "
    "(Tensor? dq, Tensor? dk, Tensor? do, Tensor? dinitial_z)",
    cpu="fla_ops.linear_attn.cpu.cpp:backward",
    cuda="fla_ops.linear_attn.gpu.normalize:backward",
    fake=fake.normalize_backward,
    flops=_backward_flops,
    inline={"cpu": "fla_ops.linear_attn.cpu.traced:backward", "cuda": "fla_ops.linear_attn.gpu.normalize:backward"},
    tags=CONTIGUOUS,
)
register(
    "normalize_output_step_(Tensor q, Tensor k, Tensor o, Tensor(a!) z, float? scale=1.0, Tensor? slots=None) -> "
    "Tensor",
    cpu="fla_ops.linear_attn.cpu.cpp:step",
    cuda="fla_ops.linear_attn.gpu.normalize:step",
    fake=fake.normalize_step,
    cast=("q", "k", "o"),
    flops=_flops,
)

START = "Tensor q, Tensor k, Tensor v, float? scale=None, Tensor? initial_state=None, Tensor? initial_z=None"
RESULT = "(Tensor o, Tensor? final_state, Tensor? final_z)"
for form in ("chunk", "fused_chunk"):
    register_composite(
        f"{form}_linear_attn({START}, bool output_final_state=False, bool normalize=True, Tensor? cu_seqlens=None, "
        f"Tensor? cu_seqlens_cpu=None, int chunk_size=64) -> {RESULT}",
        f"fla_ops.linear_attn.compose:{form}",
    )
register_composite(
    f"fused_recurrent_linear_attn({START}, bool output_final_state=False, bool reverse=False, bool normalize=False, "
    f"Tensor? cu_seqlens=None, Tensor? cu_seqlens_cpu=None) -> {RESULT}",
    "fla_ops.linear_attn.compose:fused_recurrent",
)
register_composite(
    f"linear_attn({START}, bool output_final_state=False, bool normalize=True, Tensor? cu_seqlens=None, "
    f'Tensor? cu_seqlens_cpu=None, int chunk_size=64, bool reverse=False, str mode="auto") -> {RESULT}',
    "fla_ops.linear_attn.forms:dispatch",
)
register_composite(
    "linear_attn_step_(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor(b!) z, float? scale=None, "
    "Tensor? slots=None) -> Tensor",
    "fla_ops.linear_attn.compose:step",
)
