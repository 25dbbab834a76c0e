"""The gated delta rule step by step on a CPU: the C++ kernel of this folder, or ATen where cpp.py says so.

Its gradient is the chunk form's.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import build

from .. import checks
from ..call import Call, Outputs, Step
from . import aten
from .cpp import returned, state_of

SOURCE = "gated_delta_rule/cpu/recurrent.cpp"


class Arguments(build.Walks):
    """struct Call of recurrent.cpp."""

    _fields_ = (
        ("normalize", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("g", "beta")),
        *((name, build.Steps) for name in ("q", "k", "v", "o", "state")),
    )


def forward(c: Call) -> Outputs:
    """One state for each sequence and head, updated in place at every step."""
    library = build.library(SOURCE, c.v)
    if library is None:
        return aten.forward(c)
    checks.eager(c)
    o = torch.empty_like(c.v, memory_format=torch.contiguous_format)
    state = state_of(c, c.initial_state)
    steps = [*build.steps(c.q, c.k, c.v, o), *build.rows(state)]
    _run(library, c, (c.q.shape[1], c.sequences), steps, offsets=build.offsets(c))
    return Outputs(o, returned(c, state) if c.output_final_state else None)


def step(c: Step) -> Tensor:
    """One step for N sequences: rows of the pool updated in place."""
    checks.eager_step(c)
    library = build.library(SOURCE, c.v, c.state)
    if library is None:
        return aten.step(c)
    rows = None if c.slots is None else torch.tensor(valid.slot_values(c.slots, len(c.state)))
    o = torch.empty_like(c.v, memory_format=torch.contiguous_format)
    steps = [*build.one_step(c.q, c.k, c.v, o), *build.rows(c.pool)]
    _run(library, c, (1, len(c.v)), steps, slots=rows)
    return o


def _run(
    library: ctypes.CDLL,
    c: Call | Step,
    lead: tuple[int, int],
    steps: list[int],
    offsets: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """One call of recurrent.cpp; `lead` is the time and the number of sequences.

    C++ gets raw addresses, so the caller has names that keep the tensors alive.
    """
    g, beta = (build.float32(x) for x in (c.g, c.beta))
    (key_heads, key_width), (heads, value_width) = c.q.shape[-2:], c.v.shape[-2:]
    arguments = Arguments.of(
        *(*lead, key_heads, heads, key_width, value_width),
        *(False, build.threads(c.v.numel() * key_width)),
        c.factor,
        *build.addresses(offsets, slots),
        c.use_qk_l2norm_in_kernel,
        *build.addresses(g, beta),
        *steps,
    )
    library.recurrent_forward(ctypes.byref(arguments))
