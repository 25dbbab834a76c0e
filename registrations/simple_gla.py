"""simple_gla: schemas and gradients.

Each form is one operator and one backward operator. The backward forms recompute what they need from the inputs, so a
gradient keeps nothing but those.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_ops.meta import simple_gla as fake

from . import _flops
from ._op import register, register_composite

GRADIENTS = "(Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dg, Tensor? dg_gamma, Tensor? dinitial_state)"
ACTIVATIONS = ("q", "k", "v")
CONTIGUOUS = (torch.Tag.needs_contiguous_strides,)


def _keep_chunk(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, g, g_gamma, ctx.scale, initial_state, _, ctx.state_v_first, cu_seqlens, _, ctx.chunk_size = inputs
    ctx.save_for_backward(q, k, v, g, g_gamma, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _mask(ctx: Any, *positions: int) -> list[bool]:
    return [ctx.needs_input_grad[i] for i in positions]


def _output_gradient(do: Tensor | None, v: Tensor) -> Tensor:
    """Zeros when only the final state was used."""
    return torch.zeros_like(v, memory_format=torch.contiguous_format) if do is None else do


def _chunk_gradient(op: str) -> Any:
    def backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
        if do is None and dfinal_state is None:
            return (None,) * 12
        saved = ctx.saved_tensors
        dq, dk, dv, dg, dg_gamma, dstate = getattr(torch.ops.fla, op)(
            *saved,
            _output_gradient(do, saved[2]),
            dfinal_state,
            ctx.scale,
            ctx.state_v_first,
            ctx.chunk_size,
            _mask(ctx, 0, 1, 2, 3, 4, 6),
        )
        return dq, dk, dv, dg, dg_gamma, None, dstate, None, None, None, None, None

    return backward


for form in ("chunk", "fused_chunk"):
    register(
        f"{form}_simple_gla(Tensor q, Tensor k, Tensor v, Tensor? g=None, Tensor? g_gamma=None, float? scale=None, "
        "Tensor? initial_state=None, bool output_final_state=False, bool state_v_first=False, Tensor? cu_seqlens=None, "
        "Tensor? cu_seqlens_cpu=None, int chunk_size=64) -> (Tensor o, Tensor? final_state)",
        cpu=f"fla_ops.simple_gla.cpu.cpp:{form}_forward",
        cuda=f"fla_ops.simple_gla.gpu.{form}:forward",
        fake=fake.chunk_forward,
        setup_context=_keep_chunk,
        backward=_chunk_gradient(f"{form}_simple_gla_backward"),
        cast=ACTIVATIONS,
        flops=_flops.linear_chunk,
        inline={"cpu": "fla_ops.simple_gla.cpu.traced:forward", "cuda": f"fla_ops.simple_gla.gpu.{form}:forward"},
        tags=CONTIGUOUS,
    )
    register(
        f"{form}_simple_gla_backward(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? g_gamma, Tensor? initial_state, "
        "Tensor? cu_seqlens, Tensor do, Tensor? dfinal_state, float? scale, bool state_v_first, int chunk_size, "
        f"bool[6] output_mask) -> {GRADIENTS}",
        cpu=f"fla_ops.simple_gla.cpu.cpp:{form}_backward",
        cuda=f"fla_ops.simple_gla.gpu.{form}:backward",
        fake=fake.chunk_backward,
        flops=_flops.linear_chunk_backward,
        inline={"cpu": "fla_ops.simple_gla.cpu.traced:backward", "cuda": f"fla_ops.simple_gla.gpu.{form}:backward"},
        tags=CONTIGUOUS,
    )


def _keep_recurrent(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, g, g_gamma, ctx.scale, initial_state, _, ctx.reverse, ctx.state_v_first, cu_seqlens, _ = inputs
    ctx.save_for_backward(q, k, v, g, g_gamma, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _recurrent_gradient(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    if do is None and dfinal_state is None:
        return (None,) * 12
    saved = ctx.saved_tensors
    dq, dk, dv, dg, dg_gamma, dstate = torch.ops.fla.fused_recurrent_simple_gla_backward(
        *saved,
        _output_gradient(do, saved[2]),
        dfinal_state,
        ctx.scale,
        ctx.reverse,
        ctx.state_v_first,
        _mask(ctx, 0, 1, 2, 3, 4, 6),
    )
    return dq, dk, dv, dg, dg_gamma, None, dstate, None, None, None, None, None


register(
    "fused_recurrent_simple_gla(Tensor q, Tensor k, Tensor v, Tensor? g=None, Tensor? g_gamma=None, float? scale=None, "
    "Tensor? initial_state=None, bool output_final_state=False, bool reverse=False, bool state_v_first=False, "
    "Tensor? cu_seqlens=None, Tensor? cu_seqlens_cpu=None) -> (Tensor o, Tensor? final_state)",
    cpu="fla_ops.simple_gla.cpu.cpp_recurrent:forward",
    cuda="fla_ops.simple_gla.gpu.fused_recurrent:forward",
    fake=fake.recurrent_forward,
    setup_context=_keep_recurrent,
    backward=_recurrent_gradient,
    cast=ACTIVATIONS,
    flops=_flops.linear_recurrent,
    tags=CONTIGUOUS,
)
register(
    "fused_recurrent_simple_gla_backward(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? g_gamma, "
    "Tensor? initial_state, Tensor? cu_seqlens, Tensor do, Tensor? dfinal_state, float? scale, bool reverse, "
    f"bool state_v_first, bool[6] output_mask) -> {GRADIENTS}",
    cpu="fla_ops.simple_gla.cpu.cpp_recurrent:backward",
    cuda="fla_ops.simple_gla.gpu.fused_recurrent:backward",
    fake=fake.recurrent_backward,
    flops=_flops.linear_recurrent_backward,
    tags=CONTIGUOUS,
)


def _keep_parallel(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, g, g_gamma, ctx.scale, _, cu_seqlens, _ = inputs
    ctx.save_for_backward(q, k, v, g, g_gamma, cu_seqlens)
    ctx.set_materialize_grads(False)


def _parallel_gradient(ctx: Any, do: Tensor | None, dattn: Tensor | None) -> tuple[Any, ...]:
    if do is None and dattn is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    gradients = torch.ops.fla.parallel_simple_gla_backward(
        *saved, _output_gradient(do, saved[2]), dattn, ctx.scale, _mask(ctx, 0, 1, 2, 3, 4)
    )
    return (*gradients, None, None, None, None)


register(
    "parallel_simple_gla(Tensor q, Tensor k, Tensor v, Tensor? g=None, Tensor? g_gamma=None, float? scale=None, "
    "bool output_attentions=False, Tensor? cu_seqlens=None, Tensor? cu_seqlens_cpu=None) -> (Tensor o, Tensor? attn)",
    cpu="fla_ops.simple_gla.cpu.aten_parallel:forward",
    cuda="fla_ops.simple_gla.gpu.parallel:forward",
    fake=fake.parallel_forward,
    setup_context=_keep_parallel,
    backward=_parallel_gradient,
    cast=ACTIVATIONS,
    flops=_flops.linear_parallel,
    tags=CONTIGUOUS,
)
register(
    "parallel_simple_gla_backward(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? g_gamma, Tensor? cu_seqlens, "
    "Tensor do, Tensor? dattn, float? scale, bool[5] output_mask) -> "
    "(Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dg, Tensor? dg_gamma)",
    cpu="fla_ops.simple_gla.cpu.aten_parallel:backward",
    cuda="fla_ops.simple_gla.gpu.parallel:backward",
    fake=fake.parallel_backward,
    flops=_flops.linear_parallel_backward,
    tags=CONTIGUOUS,
)
register(
    "simple_gla_step_(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor? g=None, Tensor? g_gamma=None, "
    "float? scale=None, Tensor? slots=None) -> Tensor",
    cpu="fla_ops.simple_gla.cpu.cpp_recurrent:step",
    cuda="fla_ops.simple_gla.gpu.decoding:step",
    fake=fake.step,
    cast=ACTIVATIONS,
    flops=_flops.linear_step,
)
register_composite(
    "simple_gla(Tensor q, Tensor k, Tensor v, Tensor? g=None, Tensor? g_gamma=None, float? scale=None, "
    "Tensor? initial_state=None, bool output_final_state=False, bool state_v_first=False, Tensor? cu_seqlens=None, "
    "Tensor? cu_seqlens_cpu=None, int chunk_size=64, bool reverse=False, "
    'str mode="auto") -> (Tensor o, Tensor? final_state)',
    "fla_ops.simple_gla.forms:dispatch",
)
