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
NO_GRADIENTS = build.NOTHING * 3


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
    steps = [*build.steps(c.q, c.k, c.v, o), *build.rows(state), *NO_GRADIENTS]
    _run(library.recurrent_forward, c, _lead(c), steps, (build.offsets(c), None, None))
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
    steps = [*build.steps(c.q, c.k, c.v, d.o), *build.rows(state), *build.steps(dq, dk, dv)]
    _run(library.recurrent_backward, c, _lead(c), steps, (build.offsets(c), None, None), (dg, dstate))
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
    steps = [*build.one_step(c.q, c.k, c.v, o), *build.rows(c.pool), *NO_GRADIENTS]
    _run(library.recurrent_forward, c, (1, len(c.v), False), steps, (None, rows, None))
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
    sequences, time = c.k.shape[:2]
    steps = [*build.steps(None, c.k, c.v, None), *build.rows(c.pool), *NO_GRADIENTS]
    _run(library.recurrent_advance, c, (time, sequences, False), steps, (None, rows, accepted))


def _lead(c: Call) -> tuple[int, int, bool]:
    return c.q.shape[1], c.sequences, c.reverse


def _run(
    kernel: Any,
    c: Call | Step | Advance,
    lead: tuple[int, int, bool],
    steps: list[int],
    within: tuple[Tensor | None, Tensor | None, Tensor | None] = (None,) * 3,
    gradients: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """One call of recurrent.cpp. `lead` is the time, the number of sequences and whether time runs backwards; `within`
    are the offsets, slots and counts of steps; the gradients are those of g and of the state.

    C++ gets raw addresses, so the caller has names that keep the tensors alive.
    """
    time, sequences, reverse = lead
    g, g_gamma = (build.float32(x) for x in (c.g, c.g_gamma))
    offsets, slots, accepted = within
    (key_heads, key_width), (heads, value_width) = c.k.shape[-2:], c.v.shape[-2:]
    arguments = Arguments.of(
        *(time, sequences, key_heads, heads, key_width, value_width),
        *(reverse, build.threads(c.v.numel() * key_width)),
        1.0 if isinstance(c, Advance) else c.factor,
        *build.addresses(offsets, slots, g, g_gamma, accepted),
        *steps,
        *build.addresses(*gradients),
    )
    kernel(ctypes.byref(arguments))
