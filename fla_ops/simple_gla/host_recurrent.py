"""simple_gla on a CPU, step by step: the C++ kernel of this folder, or ATen where `host.py` says so."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common import compiled

from . import aten_recurrent, checks
from .host import state_of


class Call(ctypes.Structure):
    """struct Call of recurrent.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("time", "sequences", "key_heads", "heads", "K", "V")),
        *((name, ctypes.c_int64) for name in ("reverse", "threads")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("offsets", "slots", "g", "g_gamma")),
        *((name, compiled.Steps) for name in ("q", "k", "v", "o", "state")),
        ("state_column", ctypes.c_int64),
    )


def forward(
    q, k, v, g, g_gamma, scale, initial_state, output_final_state, reverse, state_v_first, cu_seqlens, cu_seqlens_cpu
):
    """One state for each sequence and head, updated in place at every step."""
    library = compiled.library("simple_gla/recurrent.cpp", v)
    options = (initial_state, output_final_state, reverse, state_v_first, cu_seqlens, cu_seqlens_cpu)
    if library is None:
        return aten_recurrent.forward(q, k, v, g, g_gamma, scale, *options)
    checks.launch(q, k, v, g, g_gamma, initial_state, state_v_first, cu_seqlens, cu_seqlens_cpu)
    offsets = None
    if cu_seqlens is not None:
        offsets = torch.tensor(valid.cu_seqlens_values(cu_seqlens, q.shape[1]))
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    state = state_of(initial_state, q, v, cu_seqlens, state_v_first)
    _run(library, q, k, v, o, state, g, g_gamma, scale, reverse, offsets, None)
    if not output_final_state:
        return o, None
    return o, state.mT.contiguous() if state_v_first else state


def step(q, k, v, state, g, g_gamma, scale, slots):
    """One step for N sequences: rows of the pool updated in place."""
    library = compiled.library("simple_gla/recurrent.cpp", v, state)
    checks.launch_step(q, k, v, state, g, g_gamma, slots)
    if library is None:
        return aten_recurrent.step(q, k, v, state, g, g_gamma, scale, slots)
    rows = None if slots is None else torch.tensor(checks.slot_values(slots, len(state)))
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    once = (x.unsqueeze(1) for x in (q, k, v, o))
    _run(library, *once, state, g, g_gamma, scale, False, None, rows)
    return o


def _run(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    state: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    scale: float | None,
    reverse: bool,
    offsets: Tensor | None,
    slots: Tensor | None,
) -> None:
    """One call of recurrent.cpp. Every tensor whose address it gets must outlive the call: hence the names."""
    q, k, v = (compiled.dense(x) for x in (q, k, v))
    g, g_gamma = (compiled.float32(x) for x in (g, g_gamma))
    (batch, time, key_heads, key_width), (heads, value_width) = q.shape, v.shape[2:]
    sequences = batch if offsets is None else len(offsets) - 1
    call = Call(
        *(time, sequences, key_heads, heads, key_width, value_width),
        *(reverse, compiled.threads(batch * time * heads * key_width * value_width)),
        float(key_width**-0.5 if scale is None else scale),
        *(compiled.address(x) for x in (offsets, slots, g, g_gamma)),
        *(compiled.steps(x) for x in (q, k, v, o)),
        compiled.steps(state.transpose(1, 2)),
        state.stride(3),
    )
    library.recurrent_forward(ctypes.byref(call))
