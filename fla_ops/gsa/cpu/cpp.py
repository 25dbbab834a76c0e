"""gsa's chunk form on a CPU: the C++ kernels of this folder, or ATen for float64 or without a C++ compiler."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fla_ops.common.cpu import build

from .. import checks
from ..call import Call, Gradients, Kept, Need, Outputs
from . import aten, aten_recurrent
from .inputs import known, slot_gradient, state_of, states_of, with_gates

FORWARD, BACKWARD = "gsa/cpu/chunk.cpp", "gsa/cpu/chunk_backward.cpp"
NOTHING_KEPT = Kept(*[None] * 7)


class Arguments(build.Walks):
    """struct Call of chunk.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("M", "group", "chunk_size")),
        *((name, build.Steps) for name in ("q", "k", "v", "s", "g", "o", "earlier", "own")),
        *((name, build.Steps) for name in ("dq", "dk", "dv", "ds", "dg")),
        *((name, ctypes.c_void_p) for name in ("state_k", "state_v", "dstate_k", "dstate_v", "states_k", "states_v")),
    )


def chunk_forward(c: Call) -> Kept:
    """A walk along each sequence and head: what is kept for the gradient is all the memory beside the output."""
    checks.eager(c)
    library = build.library(FORWARD, c.v)
    if library is None:
        return aten.chunk_forward(c)
    kept = _empty(c)
    states = states_of(c, c.initial_k, c.initial_v)
    _run(library.chunk_forward, with_gates(c), kept, states)
    return kept._replace(final_k=states[0], final_v=states[1]) if c.output_final_state else kept


def chunk_backward(c: Call, d: Outputs, need: Need, saved: Kept) -> Gradients:
    """The gradient of chunk_forward; what it did not keep is computed again, with the same bits."""
    library = build.library(BACKWARD, c.v)
    if library is None:
        return aten.chunk_backward(c, d, need, saved)
    return _backward(library, c, d, need, saved._replace(o=d.o))


def recurrent_backward(c: Call, d: Outputs, need: Need) -> Gradients:
    """The gradient of the recurrent form, which is that of the chunk form: also with time running backwards."""
    library = build.library(BACKWARD, c.v)
    if library is None:
        return aten_recurrent.backward(c, d, need)
    return _backward(library, c, d, need, NOTHING_KEPT._replace(o=d.o))


def _backward(library: ctypes.CDLL, c: Call, d: Outputs, need: Need, kept: Kept) -> Gradients:
    inside = need.of_gates(c.g)
    gated = with_gates(c)
    slots = inside.s or inside.g
    dstate_k = state_of(c, d.final_k, c.state_shapes[0]) if need.k or slots or need.initial_k else None
    dstate_v = state_of(c, d.final_v, c.state_shapes[1]) if need.v or slots or need.initial_v else None
    filled = (
        x.new_empty(x.shape, dtype=known(x).dtype) if wanted else None
        for x, wanted in zip(gated[:5], inside[:5], strict=True)
    )
    found = Gradients(*filled, dstate_k, dstate_v)
    _run(library.chunk_backward, gated, kept, states_of(c, c.initial_k, c.initial_v), found)
    if c.g is None and need.s:
        found = found._replace(s=slot_gradient(c, gated, found.s, found.g), g=None)
    inputs = (getattr(c, name) for name in need._fields)
    return Gradients._make(
        x.to(like.dtype) if wanted else None for x, like, wanted in zip(found, inputs, need, strict=True)
    )


def _empty(c: Call) -> Kept:
    """What chunk_forward returns, to be filled; there may be fewer chunk states than rows for them."""
    o = c.v.new_empty((*c.q.shape[:3], c.v.shape[3]))
    earlier = own = states_k = states_v = None
    if c.checkpoint_level < 2:
        earlier = c.v.new_empty((*c.q.shape[:3], c.s.shape[3]), dtype=torch.float32)
        own = c.v.new_empty(c.q.shape[:3], dtype=torch.float32)
    if c.checkpoint_level < 1:
        states_k, states_v = (c.v.new_zeros((c.chunks, *x[1:]), dtype=torch.float32) for x in c.state_shapes)
    return Kept(o, None, None, earlier, own, states_k, states_v)


def _run(kernel: Any, c: Call, kept: Kept, states: tuple[Tensor, Tensor], d: Gradients | None = None) -> None:
    """One call of chunk.cpp, for a call with gates; `d` holds the gradients to be filled.

    C++ gets raw addresses, so each temporary needs a name that keeps it alive.
    """
    s, g = known(c.s), known(c.g)
    offsets = build.offsets(c)
    own = None if kept.own is None else kept.own.unsqueeze(3)
    (batch, time, query_heads, key_width), (heads, value_width) = c.q.shape, c.v.shape[2:]
    slots = s.shape[3]
    products = batch * time * query_heads * slots * (key_width + value_width)
    arguments = Arguments.of(
        *(time, batch if offsets is None else len(offsets) - 1, heads, heads, key_width, value_width),
        *(c.reverse, build.threads(products)),
        c.factor,
        *build.addresses(offsets, None),
        *(slots, query_heads // heads, c.chunk_steps),
        *build.steps(c.q, c.k, c.v, s, g, kept.o, kept.earlier, own),
        *build.steps(*(d[:5] if d else [None] * 5)),
        *build.addresses(*states, *(d[5:] if d else (None, None)), kept.states_k, kept.states_v),
    )
    kernel(ctypes.byref(arguments))
