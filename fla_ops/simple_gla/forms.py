"""Which form of simple_gla serves which call, and why not."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.dispatch import Choice, Form, Request, select, wants_gradient
from fla_ops.dispatch.crossovers import crossovers

MODES = ("chunk", "fused_chunk", "fused_recurrent", "parallel")


def _refuse_reverse(r: Request) -> list[str]:
    return ["reverse=True runs time backwards, which only fused_recurrent does"] * r.reverse


def _refuse_parallel(r: Request) -> list[str]:
    return [
        *_refuse_reverse(r),
        *["the quadratic form has no state: initial_state and output_final_state need another form"] * r.state,
    ]


FORMS = (
    Form("chunk", "chunk_simple_gla", _refuse_reverse),
    Form("fused_chunk", "fused_chunk_simple_gla", _refuse_reverse),
    Form("fused_recurrent", "fused_recurrent_simple_gla"),
    Form("parallel", "parallel_simple_gla", _refuse_parallel),
)


def order(r: Request) -> tuple[str, ...]:
    """Forms from fastest to slowest for this call; the general form serves a time that is not known."""
    table = crossovers("simple_gla", r.device, r.gradient)
    many = r.known(_spreads(r, table["fused_from_heads"])) and r.known(r.time >= table["fused_from_time"])
    chunked = ("fused_chunk", "chunk") if many else ("chunk", "fused_chunk")
    few = r.known(r.time <= table["recurrent_up_to"])
    linear = ("fused_recurrent", *chunked) if few else (*chunked, "fused_recurrent")
    short = r.known(r.time <= table["parallel_up_to"])
    most = table["parallel_up_to_scores"]
    few_scores = r.known(r.time <= math.isqrt(most)) and r.known(r.batch * r.heads * r.time * r.time <= most)
    return ("parallel", *linear) if short or few_scores else (*linear, "parallel")


def _spreads(r: Request, heads: int) -> Any:
    """Whether the fused form has enough to spread: value heads over a GPU; over a CPU's threads key heads, of which the
    table tells how many two threads want.
    """
    if r.device != "cpu":
        return r.batch * r.heads >= heads
    return r.batch * (r.heads if r.key_heads is None else r.key_heads) >= heads * torch.get_num_threads() // 2


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = 64,
    reverse: bool = False,
    mode: str = "auto",
) -> Choice:
    """The form for these arguments, which are the dispatcher's."""
    valid.rank("q", q, "[B, T, HK, K]")  # the rest is for the form's operator to check
    valid.rank("v", v, "[B, T, H, V]")
    request = Request(
        family="simple_gla",
        device=v.device.type,
        batch=v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        time=v.shape[1],
        heads=v.shape[2],
        key_width=q.shape[3],
        value_width=v.shape[3],
        dtype=v.dtype,
        gradient=wants_gradient(q, k, v, g, g_gamma, initial_state),
        packed=cu_seqlens is not None,
        state=initial_state is not None or output_final_state,
        reverse=reverse,
        key_heads=q.shape[2],
    )
    return select(FORMS, request, mode, order(request))


def dispatch(*args: Any) -> tuple[Tensor, Tensor | None]:
    """The body of torch.ops.fla.simple_gla: a call of the chosen form's operator. The arguments are those of choose."""
    q, k, v, g, g_gamma, scale, *states, cu_seqlens, cu_seqlens_cpu, chunk_size, reverse, _ = args
    initial_state, output_final_state, state_v_first = states
    choice = choose(*args)
    operator: Any = getattr(torch.ops.fla, choice.form.operator)
    if choice.form.name == "parallel":
        o, _ = operator(q, k, v, g, g_gamma, scale, False, cu_seqlens, cu_seqlens_cpu)
        return o, None
    state = (scale, initial_state, output_final_state)
    if choice.form.name == "fused_recurrent":
        o, final = operator(q, k, v, g, g_gamma, *state, reverse, state_v_first, cu_seqlens, cu_seqlens_cpu)
    else:
        o, final = operator(q, k, v, g, g_gamma, *state, state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size)
    return o, final
