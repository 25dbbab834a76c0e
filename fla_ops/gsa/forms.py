"""Which form of gsa serves which call, and why not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.dispatch import Choice, Form, Request, select, wants_gradient
from fla_ops.dispatch.crossovers import crossovers

MODES = ("chunk", "fused_recurrent")
Result = tuple[Tensor, Tensor | None, Tensor | None]


def _refuse_reverse(r: Request) -> list[str]:
    return ["reverse=True runs time backwards, which only fused_recurrent does"] * r.reverse


FORMS = (
    Form("chunk", "chunk_gsa", _refuse_reverse),
    Form("fused_recurrent", "fused_recurrent_gsa"),
)


def order(r: Request) -> tuple[str, ...]:
    """Forms from fastest to slowest for this call; the chunk form serves a time that is not known."""
    table = crossovers("gsa", r.device, r.gradient)
    recurrent_first = r.known(r.time <= table["recurrent_up_to"])
    return ("fused_recurrent", "chunk") if recurrent_first else ("chunk", "fused_recurrent")


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = 64,
    reverse: bool = False,
    mode: str = "auto",
) -> Choice:
    """The form for these arguments, which are the dispatcher's."""
    valid.rank("q", q, "[B, T, HQ, K]")  # the rest is for the form's operator to check
    valid.rank("v", v, "[B, T, H, V]")
    request = Request(
        family="gsa",
        device=v.device.type,
        batch=v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        time=v.shape[1],
        heads=v.shape[2],
        key_width=q.shape[3],
        value_width=v.shape[3],
        dtype=v.dtype,
        gradient=wants_gradient(q, k, v, s, g, *(initial_state or ())),
        packed=cu_seqlens is not None,
        state=initial_state is not None or output_final_state,
        reverse=reverse,
    )
    return select(FORMS, request, mode, order(request))


def chunk(*args: Any) -> Result:
    """The body of torch.ops.fla.chunk_gsa. What a gradient would keep is kept only if one is wanted."""
    q, k, v, s, g, scale, initial_k, initial_v, output_final_state, checkpoint_level, *layout = args
    if checkpoint_level in (0, 1) and not wants_gradient(q, k, v, s, g, initial_k, initial_v):
        checkpoint_level = 2
    o, final_k, final_v, *_ = torch.ops.fla.chunk_gsa_forward(
        q, k, v, s, g, scale, initial_k, initial_v, output_final_state, *layout, checkpoint_level
    )
    return o, final_k, final_v


def dispatch(*args: Any) -> Result:
    """The body of torch.ops.fla.gsa: a call of the chosen form's operator."""
    q, k, v, s, g, scale, initial_k, initial_v, output_final_state, checkpoint_level, *layout, reverse, mode = args
    cu_seqlens, cu_seqlens_cpu, chunk_size = layout
    states = tuple(x for x in (initial_k, initial_v) if x is not None)
    choice = choose(
        q, k, v, s, g, scale, states or None, output_final_state, checkpoint_level, cu_seqlens, cu_seqlens_cpu,
        chunk_size, reverse, mode,
    )  # fmt: skip
    inputs = (q, k, v, s, g, scale, initial_k, initial_v, output_final_state)
    if choice.form.name == "fused_recurrent":
        o, final_k, final_v = torch.ops.fla.fused_recurrent_gsa(*inputs, reverse, cu_seqlens, cu_seqlens_cpu)
    else:
        o, final_k, final_v = torch.ops.fla.chunk_gsa(*inputs, checkpoint_level, cu_seqlens, cu_seqlens_cpu, chunk_size)
    return o, final_k, final_v
