"""simple_gla step by step on a CPU: the C++ kernel of this folder, or ATen where cpp.py says so."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import build

from .. import checks
from ..call import Advance, Call, Gradients, Need, Outputs, Step
from . import aten
from .cpp import gradients_of, state_of

SOURCE = "simple_gla/cpu/recurrent.cpp"


class Arguments(build.Walks):
    """struct Call of recurrent.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("g", "g_gamma", "accepted")),
        *((name, build.Steps) for name in ("q", "k", "v", "o", "state", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("dg", "dstate")),
    )


def forward(c: Call) -> Outputs:
    """One state for each sequence and head, updated in place at every step."""
    checks.eager(c)
    library = build.library(SOURCE, c.v)
    if library is None:
        return aten.forward(c)
    o = torch.empty_like(c.v, memory_format=torch.contiguous_format)
    state = state_of(c, c.initial_state)
    _run(library.recurrent_forward, c, c.reverse, o, state, offsets=build.offsets(c))
    if not c.output_final_state:
        return Outputs(o, None)
    return Outputs(o, state.mT.contiguous() if c.state_v_first else state)


def backward(c: Call, d: Outputs, need: Need) -> Gradients:
    """The state runs again along time, then its gradient against it. With gates, S is kept every 256 steps."""
    library = build.library(SOURCE, c.v)
    if library is None:
        return aten.backward(c, d, need)
    dq, dk = (build.for_each_head(x, c.v) if wanted else None for wanted, x in ((need.q, c.q), (need.k, c.k)))
    dv = torch.empty_like(c.v, memory_format=torch.contiguous_format) if need.v else None
    dg = c.v.new_empty(c.v.shape[:3], dtype=torch.float32) if need.g or need.g_gamma else None
    dstate = state_of(c, d.final_state) if any(need[1:]) else None
    state = state_of(c, c.initial_state)
    gradients = (dstate, dq, dk, dv, dg)
    _run(library.recurrent_backward, c, c.reverse, d.o, state, *gradients, offsets=build.offsets(c))
    dq, dk = (None if x is None else build.sum_groups(x, like) for x, like in ((dq, c.q), (dk, c.k)))
    return dq, dk, dv, *gradients_of(c, need, dg, dstate)


def step(c: Step) -> Tensor:
    """One step for N sequences: rows of the pool updated in place."""
    checks.eager_step(c)
    library = build.library(SOURCE, c.v, c.state)
    if library is None:
        return aten.step(c)
    rows = None if c.slots is None else torch.tensor(valid.slot_values(c.slots, len(c.state)))
    o = torch.empty_like(c.v, memory_format=torch.contiguous_format)
    q, k, v = c.q.unsqueeze(1), c.k.unsqueeze(1), c.v.unsqueeze(1)
    once = Step(q, k, v, c.state, c.g, c.g_gamma, c.factor)
    _run(library.recurrent_forward, once, False, o.unsqueeze(1), c.pool, slots=rows)
    return o


def advance(c: Advance) -> None:
    """The first `accepted` steps of each sequence: each row of the pool is read and written once for all of them."""
    checks.eager_advance(c)
    library = build.library(SOURCE, c.v, c.state)
    if library is None:
        aten.advance(c)
        return
    accepted = torch.tensor(valid.step_counts(c.accepted, c.k.shape[1]), dtype=torch.int64)
    rows = None if c.slots is None else torch.tensor(valid.slot_values(c.slots, len(c.state)), dtype=torch.int64)
    g, g_gamma = (build.float32(x) for x in (c.g, c.g_gamma))
    (sequences, time, key_heads, key_width), (heads, value_width) = c.k.shape, c.v.shape[2:]
    arguments = Arguments(
        *(time, sequences, key_heads, heads, key_width, value_width),
        *(False, build.threads(c.v.numel() * key_width)),
        1.0,
        *(build.address(x) for x in (None, rows, g, g_gamma, accepted)),
        *(build.steps(x) for x in (None, c.k, c.v, None, c.pool.transpose(1, 2), None, None, None)),
        *(build.address(x) for x in (None, None)),
    )
    library.recurrent_advance(ctypes.byref(arguments))


def _run(
    kernel: Any,
    c: Any,
    reverse: bool,
    o: Tensor,
    state: Tensor,
    *gradients: Tensor | None,
    offsets: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """One call of recurrent.cpp; the gradients are those of the state, of q, k, v and g.

    C++ gets raw addresses, so each temporary needs a name that keeps it alive.
    """
    dstate, dq, dk, dv, dg = gradients or (None,) * 5
    g, g_gamma = (build.float32(x) for x in (c.g, c.g_gamma))
    (batch, time, key_heads, key_width), (heads, value_width) = c.q.shape, c.v.shape[2:]
    sequences = batch if offsets is None else len(offsets) - 1
    arguments = Arguments(
        *(time, sequences, key_heads, heads, key_width, value_width),
        *(reverse, build.threads(batch * time * heads * key_width * value_width)),
        c.factor,
        *(build.address(x) for x in (offsets, slots, g, g_gamma, None)),
        *(build.steps(x) for x in (c.q, c.k, c.v, o, state.transpose(1, 2), dq, dk, dv)),
        *(build.address(x) for x in (dg, dstate)),
    )
    kernel(ctypes.byref(arguments))
