"""simple_gla's chunk forms on a CPU: the C++ kernels of this folder, or ATen for float64 or without a C++ compiler.

The C++ kernels compute in float32, and take chunks of at most 64 steps.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fla_ops.common.cpu import build

from .. import checks
from ..call import Call, Gradients, Need, Outputs
from . import aten

CHUNK = 64  # steps in a chunk, at most: longer ones only cost more products


class Arguments(ctypes.Structure):
    """struct Call of chunk.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "time", "sequences", "key_heads", "heads", "K", "V")),
        *((name, ctypes.c_int64) for name in ("chunk_size", "fused", "reverse", "threads")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("offsets", "g", "g_gamma")),
        *((name, build.Steps) for name in ("q", "k", "v", "o", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("dg", "state", "dstate", "space")),
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


def _forward(c: Call, fused: bool) -> Outputs:
    checks.eager(c)
    library = build.library("simple_gla/cpu/chunk.cpp", c.v)
    if library is None:
        return aten.forward(c)
    o = torch.empty_like(c.v, memory_format=torch.contiguous_format)
    state = state_of(c, c.initial_state)
    _run(library, c, fused, o, state)
    if not c.output_final_state:
        return Outputs(o, None)
    return Outputs(o, state.mT.contiguous() if c.state_v_first else state)


def _backward(c: Call, d: Outputs, need: Need, fused: bool) -> Gradients:
    library = build.library("simple_gla/cpu/chunk.cpp", c.v)
    if library is None:
        return aten.backward(c, d, need)
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
        for wanted, x in zip(need[:3], (c.q, c.k, c.v), strict=True)
    )
    dg = c.v.new_empty(c.v.shape[:3], dtype=torch.float32) if need.g or need.g_gamma else None
    dstate = state_of(c, d.final_state) if any(need[1:]) else None
    state = state_of(c, c.initial_state).mT.contiguous()
    _run(library, c, fused, d.o, state, dstate, dq, dk, dv, dg)
    return dq, dk, dv, *gradients_of(c, need, dg, dstate)


def _run(
    library: ctypes.CDLL,
    c: Call,
    fused: bool,
    o: Tensor,
    state: Tensor,
    *gradients: Tensor | None,
) -> None:
    """One call of chunk.cpp; the gradients are those of the state, of q, k, v and g.

    C++ gets raw addresses, so each temporary needs a name that keeps it alive.
    """
    dstate, dq, dk, dv, dg = gradients or (None,) * 5
    g, g_gamma = (build.float32(x) for x in (c.g, c.g_gamma))
    offsets = build.offsets(c)
    batch, time, key_heads, width = c.q.shape
    arguments = Arguments(
        *(batch, time, state.shape[0], key_heads, c.v.shape[2], width, c.v.shape[3]),
        *(min(c.chunk_size, CHUNK), fused, c.reverse, build.threads(c.v.numel() * width)),
        c.factor,
        *(build.address(x) for x in (offsets, g, g_gamma)),
        *(build.steps(x) for x in (c.q, c.k, c.v, o, dq, dk, dv)),
        *(build.address(x) for x in (dg, state, dstate)),
    )
    library.chunk_space.restype = ctypes.c_int64
    space = state.new_empty(library.chunk_space(ctypes.byref(arguments), bool(gradients)))
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
