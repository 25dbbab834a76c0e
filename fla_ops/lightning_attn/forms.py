"""Which form of lightning_attn serves which call, and why not."""

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
    Form("chunk", "chunk_lightning_attn", _refuse_reverse),
    Form("fused_chunk", "fused_chunk_lightning_attn", _refuse_reverse),
    Form("fused_recurrent", "fused_recurrent_lightning_attn"),
)


def order(r: Request) -> tuple[str, ...]:
    """simple_gla's order: it does the work."""
    names = [form.name for form in FORMS]
    return tuple(name for name in simple_gla_forms.order(r) if name in names)


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: Any,
    num_layers: Any,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    cu_seqlens_cpu: Tensor | None = None,
    reverse: bool = False,
    slopes: str = "linear",
    mode: str = "auto",
) -> Choice:
    """The form for these arguments, which are the dispatcher's."""
    valid.rank("q", q, "[B, T, HK, K]")  # the rest is for the form's operator to check
    valid.rank("v", v, "[B, T, H, V]")
    request = Request(
        family="lightning_attn",
        device=v.device.type,
        batch=v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        time=v.shape[1],
        heads=v.shape[2],
        key_width=q.shape[3],
        value_width=v.shape[3],
        dtype=v.dtype,
        gradient=wants_gradient(q, k, v, initial_state),
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
    layer_idx: Any,
    num_layers: Any,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    cu_seqlens_cpu: Tensor | None,
    reverse: bool,
    slopes: str,
    mode: str,
) -> tuple[Tensor, Tensor | None]:
    """The body of torch.ops.fla.lightning_attn: a call of the chosen form's operator."""
    choice = choose(
        q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state, cu_seqlens, chunk_size,
        cu_seqlens_cpu, reverse, slopes, mode,
    )  # fmt: skip
    operator: Any = getattr(torch.ops.fla, choice.form.operator)
    start = (q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state)
    if choice.form.name == "fused_recurrent":
        o, final_state = operator(*start, reverse, cu_seqlens, cu_seqlens_cpu, slopes)
    else:
        o, final_state = operator(*start, cu_seqlens, chunk_size, cu_seqlens_cpu, slopes)
    return o, final_state
