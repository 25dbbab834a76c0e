"""simple_gla on a CPU: the C++ kernels of this folder, or ATen for float64 and where no C++ compiler is.

The C++ kernels compute in float32, and take chunks of at most 64 steps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fla_ops.common.cpu import build as compiled

from .. import checks
from . import aten
from .chunked import scale_of

CHUNK = 64  # steps in a chunk, at most: longer ones only cost more products


class Call(ctypes.Structure):
    """struct Call of chunk.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "time", "sequences", "key_heads", "heads", "K", "V")),
        *((name, ctypes.c_int64) for name in ("chunk_size", "fused", "reverse", "threads")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("offsets", "g", "g_gamma")),
        *((name, compiled.Steps) for name in ("q", "k", "v", "o", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("dg", "state", "dstate", "space")),
    )


def chunk_forward(*args: Any, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
    """Each pass over the chunks of all heads at once, their states in memory. The arguments are the operator's; with
    reverse=True time runs backwards, and the final state is the one after step 0.
    """
    return _forward(aten.chunk_forward, False, reverse, *args)


def fused_chunk_forward(*args: Any, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
    """A walk along each sequence and head, so that memory beyond the output does not grow with T."""
    return _forward(aten.fused_chunk_forward, True, reverse, *args)


def chunk_backward(*args: Any, reverse: bool = False) -> tuple[Tensor | None, ...]:
    """The gradient of chunk_forward; chunk states are computed again, once."""
    return _backward(aten.chunk_backward, False, reverse, *args)


def fused_chunk_backward(*args: Any, reverse: bool = False) -> tuple[Tensor | None, ...]:
    """The gradient of fused_chunk_forward: a walk forwards for the states before some chunks, then a walk back."""
    return _backward(aten.fused_chunk_backward, True, reverse, *args)


def _forward(otherwise: Callable[..., Any], fused: bool, reverse: bool, *args: Any) -> tuple[Tensor, Tensor | None]:
    q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, *packing = args
    cu_seqlens, _, chunk_size = packing
    library = compiled.library("simple_gla/cpu/chunk.cpp", v)
    if library is None:
        if not reverse:
            result: tuple[Tensor, Tensor | None] = otherwise(*args)
            return result
        steps, (initial_state,), cu_seqlens = turned((q, k, v, g), (initial_state,), cu_seqlens)
        options = (scale, initial_state, output_final_state, state_v_first, cu_seqlens, None, chunk_size)
        o, final = otherwise(*steps, g_gamma, *options)
        (o,), (final,), _ = turned((o,), (final,), cu_seqlens)
        return o, final
    checks.launch(q, k, v, g, g_gamma, initial_state, state_v_first, *packing)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    state = state_of(initial_state, q, v, cu_seqlens, state_v_first)
    _run(library, fused, reverse, q, k, v, o, g, g_gamma, cu_seqlens, scale, chunk_size, state)
    if not output_final_state:
        return o, None
    return o, state.mT.contiguous() if state_v_first else state


def _backward(otherwise: Callable[..., Any], fused: bool, reverse: bool, *args: Any) -> tuple[Tensor | None, ...]:
    q, k, v, g, g_gamma, initial_state, cu_seqlens, do, dfinal_state, *options = args
    scale, state_v_first, chunk_size, output_mask = options
    library = compiled.library("simple_gla/cpu/chunk.cpp", v)
    if library is None:
        if not reverse:
            result: tuple[Tensor | None, ...] = otherwise(*args)
            return result
        states = (initial_state, dfinal_state)
        (*steps, do), (initial_state, dfinal_state), cu_seqlens = turned((q, k, v, g, do), states, cu_seqlens)
        *grads, dgamma, dstate = otherwise(*steps, g_gamma, initial_state, cu_seqlens, do, dfinal_state, *options)
        grads, (dstate,), _ = turned(grads, (dstate,), cu_seqlens)
        return *grads, dgamma, dstate
    need_q, need_k, need_v, need_g, need_gamma, _ = output_mask
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
        for wanted, x in zip((need_q, need_k, need_v), (q, k, v), strict=True)
    )
    dg = dstate = None
    if need_g or need_gamma:
        dg = v.new_empty(v.shape[:3], dtype=torch.float32)
    if any(output_mask[1:]):
        dstate = state_of(dfinal_state, q, v, cu_seqlens, state_v_first)
    state = state_of(initial_state, q, v, cu_seqlens, state_v_first).mT.contiguous()
    _run(library, fused, reverse, q, k, v, do, g, g_gamma, cu_seqlens, scale, chunk_size, state, dstate, dq, dk, dv, dg)
    return dq, dk, dv, *gradients_of(g, g_gamma, initial_state, dg, dstate, state_v_first, output_mask)


def _run(
    library: ctypes.CDLL,
    fused: bool,
    reverse: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    chunk_size: int,
    state: Tensor,
    *gradients: Tensor | None,
) -> None:
    """One call of chunk.cpp; the gradients are those of the state, of q, k, v and g. Every tensor whose address it gets
    must outlive the call: hence the names.
    """
    dstate, dq, dk, dv, dg = gradients or (None,) * 5
    g, g_gamma = (compiled.float32(x) for x in (g, g_gamma))
    offsets = compiled.offsets(cu_seqlens, q)
    batch, time, key_heads, width = q.shape
    call = Call(
        *(batch, time, state.shape[0], key_heads, v.shape[2], width, v.shape[3]),
        *(min(chunk_size, CHUNK), fused, reverse, compiled.threads(v.numel() * width)),
        scale_of(q, scale),
        *(compiled.address(x) for x in (offsets, g, g_gamma)),
        *(compiled.steps(x) for x in (q, k, v, o, dq, dk, dv)),
        *(compiled.address(x) for x in (dg, state, dstate)),
    )
    library.chunk_space.restype = ctypes.c_int64
    space = state.new_empty(library.chunk_space(ctypes.byref(call), bool(gradients)))
    call.space = space.data_ptr()
    (library.chunk_backward if gradients else library.chunk_forward)(ctypes.byref(call))


def turned(
    steps: Sequence[Tensor | None], states: Sequence[Tensor | None], cu_seqlens: Tensor | None
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
    """The same sequences with time backwards, for code that only walks forwards: [B, T, ...] from the last step to the
    first, and so packed sequences with their states [N, ...] from the last to the first.
    """
    steps = [None if x is None else x.flip(1) for x in steps]
    if cu_seqlens is None:
        return steps, list(states), None
    states = [None if x is None else x.flip(0) for x in states]
    return steps, states, (cu_seqlens[-1] - cu_seqlens).flip(0)


def state_of(state: Tensor | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, state_v_first: bool) -> Tensor:
    """A fresh [N, H, K, V] in float32; zeros where there is none."""
    if state is None:
        sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        return v.new_zeros((sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    state = state.mT if state_v_first else state
    return state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def gradients_of(
    g: Tensor | None,
    g_gamma: Tensor | None,
    initial_state: Tensor | None,
    dg: Tensor | None,
    dstate: Tensor | None,
    state_v_first: bool,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of g, g_gamma and initial_state that output_mask asks for, from dg and dstate [N, H, K, V] in float32."""
    need_g, need_gamma, need_state = output_mask[3:]
    if need_state and state_v_first:
        dstate = dstate.mT.contiguous()
    return (
        dg.to(g.dtype) if need_g else None,
        dg.sum((0, 1)).to(g_gamma.dtype) if need_gamma else None,
        dstate.to(initial_state.dtype) if need_state else None,
    )
