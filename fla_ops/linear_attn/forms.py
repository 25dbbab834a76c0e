"""Which form of linear_attn serves which call, and why not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.dispatch import Choice, Form, Request, select, wants_gradient
from fla_ops.simple_gla import forms as simple_gla_forms


def _refuse_reverse(r: Request) -> list[str]:
    return ["reverse=True runs time backwards, which only fused_recurrent does"] * r.reverse


FORMS = (
    Form("chunk", "chunk_linear_attn", _refuse_reverse),
    Form("fused_chunk", "fused_chunk_linear_attn", _refuse_reverse),
    Form("fused_recurrent", "fused_recurrent_linear_attn"),
)


def order(r: Request) -> tuple[str, ...]:
    """simple_gla's order, which this family's time follows."""
    names = [form.name for form in FORMS]
    return tuple(name for name in simple_gla_forms.order(r) if name in names)


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = 64,
    reverse: bool = False,
    mode: str = "auto",
) -> Choice:
    """The form for these arguments, which are the dispatcher's."""
    valid.rank("q", q, "[B, T, HK, K]")  # the rest is for the form's operator to check
    valid.rank("v", v, "[B, T, H, V]")
    states = initial_state if isinstance(initial_state, (tuple, list)) else (initial_state,)
    request = Request(
        family="linear_attn",
        device=v.device.type,
        batch=v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        time=v.shape[1],
        heads=v.shape[2],
        key_width=q.shape[3],
        value_width=v.shape[3],
        dtype=v.dtype,
        gradient=wants_gradient(q, k, v, *states),
        packed=cu_seqlens is not None,
        state=initial_state is not None or output_final_state,
        reverse=reverse,
        key_heads=q.shape[2],
    )
    return select(FORMS, request, mode, order(request))


def dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    initial_z: Tensor | None,
    output_final_state: bool,
    normalize: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    chunk_size: int,
    reverse: bool,
    mode: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The body of torch.ops.fla.linear_attn: a call of the chosen form's operator."""
    states, packing = (initial_state, initial_z), (cu_seqlens, cu_seqlens_cpu)
    choice = choose(q, k, v, scale, states, output_final_state, normalize, *packing, chunk_size, reverse, mode)
    operator: Any = getattr(torch.ops.fla, choice.form.operator)
    if choice.form.name == "fused_recurrent":
        o, kv, z = operator(q, k, v, scale, *states, output_final_state, reverse, normalize, *packing)
    else:
        o, kv, z = operator(q, k, v, scale, *states, output_final_state, normalize, *packing, chunk_size)
    return o, kv, z
