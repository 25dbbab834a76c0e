"""The gated delta rule's chunk form on a CPU: the C++ kernel of this folder, or ATen for float64 or without a compiler.

The kernel computes in float32, and takes chunks of at most 64 steps.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fla_ops.common.cpu import build

from .. import checks
from ..call import Call, Gradients, Need, Outputs
from . import aten

SOURCE = "gated_delta_rule/cpu/chunk.cpp"
CHUNK = 64  # steps in a chunk, at most: longer ones only cost more products


class Arguments(build.Walks):
    """struct Call of chunk.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("chunk_size", "normalize")),
        *((name, ctypes.c_void_p) for name in ("g", "beta")),
        *((name, build.Steps) for name in ("q", "k", "v", "o", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("dg", "dbeta", "state", "dstate")),
    )


def forward(c: Call) -> Outputs:
    """A walk along each sequence and head, so that memory beyond the output does not grow with T."""
    library = build.library(SOURCE, c.v)
    if library is None:
        return aten.forward(c)
    checks.eager(c)
    o = torch.empty_like(c.v, memory_format=torch.contiguous_format)
    state = state_of(c, c.initial_state)
    _run(library.chunk_forward, c, o, state)
    return Outputs(o, returned(c, state) if c.output_final_state else None)


def backward(c: Call, d: Outputs, need: Need) -> Gradients:
    """A walk along time for the states and errors of all chunks, then a walk back."""
    library = build.library(SOURCE, c.v)
    if library is None:
        return aten.backward(c, d, need)
    dq, dk = (build.for_each_head(x, c.v) if wanted else None for wanted, x in ((need.q, c.q), (need.k, c.k)))
    dv = torch.empty_like(c.v, memory_format=torch.contiguous_format) if need.v else None
    dg, dbeta = (c.v.new_empty(c.v.shape[:3], dtype=torch.float32) if x else None for x in (need.g, need.beta))
    dstate = state_of(c, d.final_state)
    _run(library.chunk_backward, c, d.o, state_of(c, c.initial_state), dstate, dq, dk, dv, dg, dbeta)
    dq, dk = (None if x is None else build.sum_groups(x, like) for x, like in ((dq, c.q), (dk, c.k)))
    dg, dbeta = (None if x is None else x.to(like.dtype) for x, like in ((dg, c.g), (dbeta, c.beta)))
    dinitial = returned(c, dstate).to(c.initial_state.dtype) if need.initial_state else None
    return dq, dk, dv, dg, dbeta, dinitial


def _run(kernel: Any, c: Call, o: Tensor, state: Tensor, *gradients: Tensor | None) -> None:
    """One call of chunk.cpp; the gradients are those of the state, of q, k, v, g and beta.

    C++ gets raw addresses, so each temporary needs a name that keeps it alive.
    """
    dstate, dq, dk, dv, dg, dbeta = gradients or (None,) * 6
    g, beta = (build.float32(x) for x in (c.g, c.beta))
    offsets = build.offsets(c)
    (_, time, key_heads, key_width), (heads, value_width) = c.q.shape, c.v.shape[2:]
    arguments = Arguments.of(
        *(time, state.shape[0], key_heads, heads, key_width, value_width),
        *(c.reverse, build.threads(c.v.numel() * key_width)),
        c.factor,
        *build.addresses(offsets, None),
        *(min(c.chunk_size, CHUNK), c.use_qk_l2norm_in_kernel),
        *build.addresses(g, beta),
        *build.steps(c.q, c.k, c.v, o, dq, dk, dv),
        *build.addresses(dg, dbeta, state, dstate),
    )
    kernel(ctypes.byref(arguments))


def state_of(c: Call, state: Tensor | None) -> Tensor:
    """A fresh [N, H, K, V] in float32 from a state of the call, or zeros."""
    if state is None:
        return c.v.new_zeros((c.sequences, c.v.shape[2], c.q.shape[3], c.v.shape[3]), dtype=torch.float32)
    state = state.mT if c.state_v_first else state
    return state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def returned(c: Call, state: Tensor) -> Tensor:
    """The inverse, in float32."""
    return state.mT.contiguous() if c.state_v_first else state
