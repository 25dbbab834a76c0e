"""gsa step by step on a CPU: the C++ kernel of this folder, or ATen for float64 or without a C++ compiler."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import build

from .. import checks
from ..call import Call, Outputs, Step
from . import aten_recurrent
from .inputs import known, states_of, with_gates

SOURCE = "gsa/cpu/recurrent.cpp"


class Arguments(build.Walks):
    """struct Call of recurrent.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("M", "group")),
        *((name, build.Steps) for name in ("q", "k", "v", "s", "g", "o", "state_k", "state_v")),
    )


def forward(c: Call) -> Outputs:
    """Both states of each sequence and head, updated in place at every step."""
    checks.eager(c)
    library = build.library(SOURCE, c.v)
    if library is None:
        return aten_recurrent.forward(c)
    o = c.v.new_empty((*c.q.shape[:3], c.v.shape[3]))
    gated, states, offsets = with_gates(c), states_of(c, c.initial_k, c.initial_v), build.offsets(c)
    s, g = known(gated.s), known(gated.g)
    steps = [*build.steps(c.q, c.k, c.v, s, g, o), *build.rows(*states)]
    _run(library, c, (c.q.shape[1], c.sequences, c.reverse), steps, offsets=offsets)
    return Outputs(o, *(states if c.output_final_state else (None, None)))


def step(c: Step) -> Tensor:
    """One step for N sequences: rows of both pools updated in place."""
    checks.eager_step(c)
    library = build.library(SOURCE, c.v, c.state_k, c.state_v)
    if library is None:
        return aten_recurrent.step(c)
    rows = None if c.slots is None else torch.tensor(valid.slot_values(c.slots, len(c.state_k)))
    o = c.v.new_empty((*c.q.shape[:2], c.v.shape[2]))
    s, g = known(c.s), known(c.g)
    steps = [*build.one_step(c.q, c.k, c.v, s, g, o), *build.rows(*c.pools)]
    _run(library, c, (1, len(c.q), False), steps, slots=rows)
    return o


def _run(
    library: Any,
    c: Call | Step,
    lead: tuple[int, int, bool],
    steps: list[int],
    offsets: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """One call of recurrent.cpp; `lead` is the time, the number of sequences, and whether time runs backwards.

    C++ gets raw addresses, so the caller has names that keep the tensors alive.
    """
    time, sequences, reverse = lead
    (query_heads, key_width), (heads, value_width) = c.q.shape[-2:], c.v.shape[-2:]
    memory = c.s.shape[-1]
    rows = c.q.numel() // (query_heads * key_width)  # of the batch or the pack, and in time
    arguments = Arguments.of(
        *(time, sequences, heads, heads, key_width, value_width),
        *(reverse, build.threads(rows * heads * memory * (key_width + value_width))),
        c.factor,
        *build.addresses(offsets, slots),
        *(memory, query_heads // heads),
        *steps,
    )
    library.recurrent_forward(ctypes.byref(arguments))
