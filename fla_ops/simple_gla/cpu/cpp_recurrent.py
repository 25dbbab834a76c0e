"""simple_gla on a CPU, step by step: the C++ kernel of this folder, or ATen where `host.py` says so."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import build as compiled

from .. import checks
from . import aten_recurrent
from .chunked import scale_of
from .cpp import gradients_of, state_of

SOURCE = "simple_gla/cpu/recurrent.cpp"


class Call(compiled.Walks):
    """struct Call of recurrent.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("g", "g_gamma")),
        *((name, compiled.Steps) for name in ("q", "k", "v", "o", "state", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("dg", "dstate")),
    )


def forward(
    q, k, v, g, g_gamma, scale, initial_state, output_final_state, reverse, state_v_first, cu_seqlens, cu_seqlens_cpu
):
    """One state for each sequence and head, updated in place at every step."""
    library = compiled.library(SOURCE, v)
    if library is None:
        options = (initial_state, output_final_state, reverse, state_v_first, cu_seqlens, cu_seqlens_cpu)
        return aten_recurrent.forward(q, k, v, g, g_gamma, scale, *options)
    checks.launch(q, k, v, g, g_gamma, initial_state, state_v_first, cu_seqlens, cu_seqlens_cpu)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    state = state_of(initial_state, q, v, cu_seqlens, state_v_first)
    gates = (g, g_gamma, scale_of(q, scale), reverse)
    _run(library.recurrent_forward, q, k, v, o, state, *gates, compiled.offsets(cu_seqlens, q))
    if not output_final_state:
        return o, None
    return o, state.mT.contiguous() if state_v_first else state


def backward(
    q, k, v, g, g_gamma, initial_state, cu_seqlens, do, dfinal_state, scale, reverse, state_v_first, output_mask
):
    """The state runs again along time, then its gradient against it. With gates, S is kept every 256 steps."""
    library = compiled.library(SOURCE, v)
    if library is None:
        inputs = (q, k, v, g, g_gamma, initial_state, cu_seqlens, do, dfinal_state)
        return aten_recurrent.backward(*inputs, scale, reverse, state_v_first, output_mask)
    need_q, need_k, need_v, need_g, need_gamma, _ = output_mask
    dq, dk = (compiled.for_each_head(x, v) if wanted else None for wanted, x in ((need_q, q), (need_k, k)))
    dv = torch.empty_like(v, memory_format=torch.contiguous_format) if need_v else None
    dg = dstate = None
    if need_g or need_gamma:
        dg = v.new_empty(v.shape[:3], dtype=torch.float32)
    if any(output_mask[1:]):
        dstate = state_of(dfinal_state, q, v, cu_seqlens, state_v_first)
    state = state_of(initial_state, q, v, cu_seqlens, state_v_first)
    gates = (g, g_gamma, scale_of(q, scale), reverse)
    _run(
        library.recurrent_backward,
        q,
        k,
        v,
        do,
        state,
        *gates,
        compiled.offsets(cu_seqlens, q),
        None,
        dstate,
        dq,
        dk,
        dv,
        dg,
    )
    dq, dk = (None if d is None else compiled.sum_groups(d, x) for d, x in ((dq, q), (dk, k)))
    return dq, dk, dv, *gradients_of(g, g_gamma, initial_state, dg, dstate, state_v_first, output_mask)


def step(q, k, v, state, g, g_gamma, scale, slots):
    """One step for N sequences: rows of the pool updated in place."""
    library = compiled.library(SOURCE, v, state)
    if library is None:
        return aten_recurrent.step(q, k, v, state, g, g_gamma, scale, slots)
    checks.launch_step(q, k, v, state, g, g_gamma, slots)
    rows = None if slots is None else torch.tensor(valid.slot_values(slots, len(state)))
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    once = (x.unsqueeze(1) for x in (q, k, v, o))
    scale = float(q.shape[2] ** -0.5 if scale is None else scale)
    _run(library.recurrent_forward, *once, state, g, g_gamma, scale, False, None, rows)
    return o


def _run(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    state: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    scale: float,
    reverse: bool,
    offsets: Tensor | None,
    slots: Tensor | None = None,
    *gradients: Tensor | None,
) -> None:
    """One call of recurrent.cpp; the gradients are those of the state, of q, k, v and g. Every tensor whose address it
    gets must outlive the call: hence the names.
    """
    dstate, dq, dk, dv, dg = gradients or (None,) * 5
    g, g_gamma = (compiled.float32(x) for x in (g, g_gamma))
    (batch, time, key_heads, key_width), (heads, value_width) = q.shape, v.shape[2:]
    sequences = batch if offsets is None else len(offsets) - 1
    call = Call(
        *(time, sequences, key_heads, heads, key_width, value_width),
        *(reverse, compiled.threads(batch * time * heads * key_width * value_width)),
        scale,
        *(compiled.address(x) for x in (offsets, slots, g, g_gamma)),
        *(compiled.steps(x) for x in (q, k, v, o, state.transpose(1, 2), dq, dk, dv)),
        *(compiled.address(x) for x in (dg, dstate)),
    )
    kernel(ctypes.byref(call))
