"""simple_gla's chunk forms on a CPU: the C++ kernels of this folder, or ATen for float64 or without a C++ compiler.

The C++ kernels compute in float32, and take chunks of at most 64 steps.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import build

from .. import checks
from ..call import Call, Gradients, Need, Outputs, Prefill, Record, Recorded
from ..stopping import stopped
from . import aten

SOURCE = "simple_gla/cpu/chunk.cpp"
CHUNK = 64  # steps in a chunk, at most: longer ones only cost more products


class States(ctypes.Structure):
    """struct States of chunk.h."""

    _fields_ = (("pool", build.Steps), ("slots", ctypes.c_void_p), ("fresh", ctypes.c_void_p))


def states(pool: Tensor | None, slots: Tensor | None = None, fresh: Tensor | None = None) -> list[int]:
    """The numbers of a States for [P, H, rows, width]; zeros for None."""
    return [*build.rows(pool), *build.addresses(slots, fresh)]


class Arguments(build.Arguments):
    """struct Call of chunk.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "time", "sequences", "key_heads", "heads", "K", "V")),
        *((name, ctypes.c_int64) for name in ("chunk_size", "every", "fused", "reverse", "threads")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("offsets", "g", "g_gamma")),
        *((name, build.Steps) for name in ("q", "k", "v", "o", "dq", "dk", "dv", "kept")),
        *((name, States) for name in ("state", "dstate")),
        *((name, ctypes.c_void_p) for name in ("dg", "space")),
    )


def chunk_forward(c: Call) -> Outputs:
    """Each pass over the chunks of all heads at once, their states in memory."""
    return _forward(c, fused=False)


def fused_chunk_forward(c: Call) -> Outputs:
    """A walk along each sequence and head, so that memory beyond the output does not grow with T."""
    return _forward(c, fused=True)


def chunk_backward(c: Call, d: Outputs, need: Need) -> Gradients:
    """The gradient of chunk_forward; chunk states are computed again, once."""
    return _backward(c, d, need, fused=False)


def fused_chunk_backward(c: Call, d: Outputs, need: Need) -> Gradients:
    """The gradient of fused_chunk_forward: a walk forwards for the states before some chunks, then a walk back."""
    return _backward(c, d, need, fused=True)


def prefill(c: Prefill) -> Tensor:
    """The same from rows of a pool to the same rows."""
    checks.eager_prefill(c)
    library = build.library(SOURCE, c.v, c.state)
    if library is None:
        return aten.prefill(c)
    o = torch.empty_like(c.v, memory_format=torch.contiguous_format)
    rows = None if c.slots is None else valid.slot_values(c.slots, len(c.state))
    if rows is not None:
        _clear_padding(c, rows, o)
    slots = None if rows is None else torch.tensor(rows)
    fresh = None if c.fresh is None else c.fresh.contiguous()
    _run(library, c.call(), _walks(c), o, states(c.pool, slots, fresh))
    return o


def record(c: Record) -> Recorded:
    """The same with states on the way, without outputs where there are no queries."""
    checks.eager_record(c)
    library = build.library(SOURCE, c.v)
    if library is None:
        return aten.record(c)
    if c.at is not None:
        return stopped(c, record)
    call, o = c.call(), None
    if c.q is not None:
        o = torch.empty_like(c.v, memory_format=torch.contiguous_format)
    kept = c.v.new_zeros((c.rows, *call.state_shape[1:]), dtype=torch.float32)
    final = kept.new_zeros(call.state_shape) if c.initial_state is None else kept.new_empty(call.state_shape)
    if c.initial_state is not None:
        final.copy_(c.initial_state)
    by_key = [x.mT if c.state_v_first else x for x in (kept, final)]
    _run(library, call, _walks(call), o, states(by_key[1]), kept=by_key[0], every=c.every)
    return Recorded(o, kept, final)


def _walks(c: Any) -> bool:
    """Whether the fused form, which gives the same bits, has work for all threads."""
    return int(c.sequences) * c.k.shape[2] >= 2 * torch.get_num_threads()


def _clear_padding(c: Prefill, rows: list[int], o: Tensor) -> None:
    """Zeros in the steps of sequences whose slot is -1."""
    offsets = None if c.cu_seqlens is None else c.cu_seqlens.tolist()
    for n, row in enumerate(rows):
        if row < 0:
            (o[n] if offsets is None else o[0, offsets[n] : offsets[n + 1]]).zero_()


def _forward(c: Call, fused: bool) -> Outputs:
    checks.eager(c)
    library = build.library(SOURCE, c.v)
    if library is None:
        return aten.forward(c)
    o = torch.empty_like(c.v, memory_format=torch.contiguous_format)
    state = state_of(c, c.initial_state)
    _run(library, c, fused, o, states(state))
    if not c.output_final_state:
        return Outputs(o, None)
    return Outputs(o, state.mT.contiguous() if c.state_v_first else state)


def _backward(c: Call, d: Outputs, need: Need, fused: bool) -> Gradients:
    library = build.library(SOURCE, c.v)
    if library is None:
        return aten.backward(c, d, need)
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
        for wanted, x in zip(need[:3], (c.q, c.k, c.v), strict=True)
    )
    dg = c.v.new_empty(c.v.shape[:3], dtype=torch.float32) if need.g or need.g_gamma else None
    dstate = state_of(c, d.final_state) if any(need[1:]) else None
    state = state_of(c, c.initial_state).mT.contiguous()
    _run(library, c, fused, d.o, states(state), states(dstate), dq, dk, dv, dg)
    return dq, dk, dv, *gradients_of(c, need, dg, dstate)


def _run(
    library: ctypes.CDLL,
    c: Call,
    fused: bool,
    o: Tensor | None,
    state: list[int],
    *gradients: Any,
    kept: Tensor | None = None,
    every: int = 0,
) -> None:
    """One call of chunk.cpp; the gradients are those of the state, of q, k, v and g. `kept` [C, H, K, V] receives the
    state after every so many steps.

    C++ gets raw addresses, so each temporary needs a name that keeps it alive.
    """
    dstate, dq, dk, dv, dg = gradients or (states(None), *(None,) * 4)
    g, g_gamma = (build.float32(x) for x in (c.g, c.g_gamma))
    offsets = build.offsets(c)
    batch, time, key_heads, width = c.q.shape
    arguments = Arguments.of(
        *(batch, time, c.sequences, key_heads, c.v.shape[2], width, c.v.shape[3]),
        *(min(c.chunk_size, CHUNK), every, fused, c.reverse, build.threads(c.v.numel() * width)),
        c.factor,
        *build.addresses(offsets, g, g_gamma),
        *build.steps(c.q, c.k, c.v, o, dq, dk, dv),
        *(*build.rows(kept), *state, *dstate),
        *build.addresses(dg, None),
    )
    library.chunk_space.restype = ctypes.c_int64
    space = torch.empty(library.chunk_space(ctypes.byref(arguments), bool(gradients)), dtype=torch.float32)
    arguments.space = space.data_ptr()
    (library.chunk_backward if gradients else library.chunk_forward)(ctypes.byref(arguments))


def state_of(c: Call, state: Tensor | None) -> Tensor:
    """A fresh [N, H, K, V] in float32 from a state of the call, or zeros."""
    if state is None:
        return c.v.new_zeros((c.sequences, c.v.shape[2], c.q.shape[3], c.v.shape[3]), dtype=torch.float32)
    state = state.mT if c.state_v_first else state
    return state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def gradients_of(
    c: Call, need: Need, dg: Tensor | None, dstate: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of g, g_gamma and initial_state that are needed, from dg and dstate [N, H, K, V] in float32."""
    if need.initial_state and c.state_v_first:
        dstate = dstate.mT.contiguous()
    return (
        dg.to(c.g.dtype) if need.g else None,
        dg.sum((0, 1)).to(c.g_gamma.dtype) if need.g_gamma else None,
        dstate.to(c.initial_state.dtype) if need.initial_state else None,
    )
