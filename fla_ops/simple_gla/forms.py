"""Which form of simple_gla serves which call, and why not."""

from __future__ import annotations

import math
from typing import Any

import torch

from fla_ops import launch
from fla_ops.dispatch import Family, Form, known, wants_gradient
from fla_ops.dispatch.crossovers import crossovers

from . import call, checks
from .call import Call


def refuse_parallel(c: Call) -> list[str]:
    """The quadratic form runs along time, from no state to no state."""
    state = c.initial_state is not None or c.output_final_state
    return [
        *["reverse=True runs time backwards, which the quadratic form does not"] * c.reverse,
        *["the quadratic form has no state: initial_state and output_final_state need another form"] * state,
    ]


def note_chunk_kernels(c: Any) -> list[str]:
    """Where the fused form runs the chunk form's kernels on a GPU."""
    if c.v.device.type != "cuda":
        return []
    width = c.q.shape[3]
    if not launch.covers("fused_chunk", c.v, width):
        return [f"K = {width} is too wide for one program to hold the state: the chunk form's kernels run"]
    gates = [x for name in ("g", "g_gamma") if (x := getattr(c, name, None)) is not None]
    gated = torch.is_grad_enabled() and any(x.requires_grad for x in gates)
    return ["the gradient with a gate runs the chunk form's kernels"] * gated


def order(c: Any) -> tuple[str, ...]:
    """Forms from fastest to slowest for this call; the general form serves a time that is not known."""
    table = crossovers("simple_gla", c.v.device.type, wants_gradient(c))
    time = c.v.shape[1]
    many = known(_enough_heads(c, table["fused_from_heads"])) and known(time >= table["fused_from_time"])
    chunked = ("fused_chunk", "chunk") if many else ("chunk", "fused_chunk")
    few = known(time <= table["recurrent_up_to"])
    linear = ("fused_recurrent", *chunked) if few else (*chunked, "fused_recurrent")
    short = known(time <= table["parallel_up_to"])
    most = table["parallel_up_to_scores"]
    few_scores = known(time <= math.isqrt(most)) and known(c.sequences * c.v.shape[2] * time * time <= most)
    return ("parallel", *linear) if short or few_scores else (*linear, "parallel")


def _enough_heads(c: Any, heads: int) -> Any:
    """Whether there are enough heads to fill the device: value heads on a GPU, key heads per two threads on a CPU."""
    if c.v.device.type != "cpu":
        return c.sequences * c.v.shape[2] >= heads
    return c.sequences * c.q.shape[2] >= heads * torch.get_num_threads() // 2


FAMILY = Family(
    signature=call.DISPATCHER,
    forms=(
        Form("chunk", call.CHUNK),
        Form("fused_chunk", call.FUSED_CHUNK, note=note_chunk_kernels),
        Form("fused_recurrent", call.RECURRENT),
        Form("parallel", call.PARALLEL, refuse_parallel),
    ),
    check=checks.inputs,
    order=order,
)
dispatch = FAMILY.dispatch
