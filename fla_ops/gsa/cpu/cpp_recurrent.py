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
    states = states_of(c, c.initial_k, c.initial_v)
    _run(library, with_gates(c), o, *states, offsets=build.offsets(c))
    return Outputs(o, *(states if c.output_final_state else (None, None)))


def step(c: Step) -> Tensor:
    """One step for N sequences: rows of both pools updated in place."""
    checks.eager_step(c)
    library = build.library(SOURCE, c.v, c.state_k, c.state_v)
    if library is None:
        return aten_recurrent.step(c)
    rows = None if c.slots is None else torch.tensor(valid.slot_values(c.slots, len(c.state_k)))
    o = c.v.new_empty((*c.q.shape[:2], c.v.shape[2]))
    q, k, v, s, g = (x.unsqueeze(1) for x in c[:5])
    _run(library, Call(q, k, v, s, g, c.scale), o.unsqueeze(1), *c.pools, slots=rows)
    return o


def _run(
    library: Any,
    c: Call,
    o: Tensor,
    state_k: Tensor,
    state_v: Tensor,
    offsets: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """One call of recurrent.cpp. C++ gets raw addresses, so each temporary needs a name that keeps it alive."""
    s, g = known(c.s), known(c.g)
    (batch, time, query_heads, key_width), (heads, value_width) = c.q.shape, c.v.shape[2:]
    sequences, slots_of_memory = batch if offsets is None else len(offsets) - 1, c.s.shape[3]
    products = batch * time * heads * slots_of_memory * (key_width + value_width)
    arguments = Arguments(
        *(time, sequences, heads, heads, key_width, value_width),
        *(c.reverse, build.threads(products)),
        c.factor,
        *(build.address(x) for x in (offsets, slots)),
        *(slots_of_memory, query_heads // heads),
        *(build.steps(x) for x in (c.q, c.k, c.v, s, g, o, state_k.transpose(1, 2), state_v.transpose(1, 2))),
    )
    library.recurrent_forward(ctypes.byref(arguments))
