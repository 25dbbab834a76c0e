"""Which form of attn serves which call, and why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from fla_ops import validation as valid
from fla_ops.dispatch import Choice, Form, Request, select, wants_gradient

MODES = ("parallel", "decoding")


@dataclass(frozen=True)
class AttentionRequest(Request):
    """A request in which the queries may be fewer than the keys; `time` counts the keys."""

    queries: Any = None
    sequences: Any = None
    gate_scaled: bool = False


def _refuse_parallel(request: Request) -> list[str]:
    r = cast(AttentionRequest, request)
    return [
        *[f"q has {r.queries} steps and k has {r.time}: every step has a query and a key"]
        * (r.packed and r.known(r.queries != r.time)),
        *["do_gate_scale belongs to decoding: multiply g before the call"] * r.gate_scaled,
    ]


def _refuse_decoding(request: Request) -> list[str]:
    r = cast(AttentionRequest, request)
    return [
        *["decoding needs cu_seqlens, which says whose cache is where"] * (not r.packed),
        *[f"q has {r.queries} steps and cu_seqlens names {r.sequences} sequences: decoding takes one step of each"]
        * (r.packed and r.known(r.queries != r.sequences)),
        *["decoding is for inference and has no gradient"] * r.gradient,
    ]


FORMS = (
    Form("parallel", "parallel_attn", _refuse_parallel),
    Form("decoding", "attn_decoding_one_step", _refuse_decoding),
)


def order(r: AttentionRequest) -> tuple[str, ...]:
    """As many queries as keys are the parallel form's, also with one key a sequence; so are sizes that are unknown."""
    if guard_or_false(r.queries == r.time):  # a guard that either form would add
        return MODES
    return MODES[::-1] if r.known(r.queries == r.sequences) or r.known(r.queries != r.time) else MODES


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    do_gate_scale: bool = False,
    sink_bias: Tensor | None = None,
    mode: str = "auto",
) -> Choice:
    """The form for these arguments, which are the dispatcher's."""
    valid.rank("q", q, "[B, T, HQ, K]")  # the rest is for the form's operator to check
    valid.rank("k", k, "[B, T, H, K]")
    valid.rank("v", v, "[B, T, H, V]")
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    request = AttentionRequest(
        family="attn",
        device=q.device.type,
        batch=sequences,
        time=k.shape[1],
        heads=q.shape[2],
        key_width=q.shape[3],
        value_width=v.shape[3],
        dtype=q.dtype,
        gradient=wants_gradient(q, k, v, g, sink_bias),
        packed=cu_seqlens is not None,
        queries=q.shape[1],
        sequences=sequences,
        gate_scaled=do_gate_scale,
    )
    return select(FORMS, request, mode, order(request))


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    window_size: int | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    sink_bias: Tensor | None,
) -> Tensor:
    """The body of torch.ops.fla.parallel_attn."""
    trained = wants_gradient(q, k, v, g, sink_bias)
    o, _, _ = torch.ops.fla.parallel_attn_forward(
        q, k, v, g, scale, window_size, cu_seqlens, chunk_indices, sink_bias, trained
    )
    return cast(Tensor, o)


def dispatch(*args: Any) -> Tensor:
    """The body of torch.ops.fla.attn: a call of the chosen form's operator. The arguments are those of choose."""
    q, k, v, g, scale, window_size, cu_seqlens, chunk_indices, do_gate_scale, sink_bias, _ = args
    if choose(*args).form.name == "parallel":
        return parallel(q, k, v, g, scale, window_size, cu_seqlens, chunk_indices, sink_bias)
    o = torch.ops.fla.attn_decoding_one_step(q, k, v, g, scale, cu_seqlens, do_gate_scale, sink_bias, window_size)
    return cast(Tensor, o)
