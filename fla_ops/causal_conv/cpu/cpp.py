"""causal_conv on a CPU: the C++ kernel of this folder, or ATen for float64 or without a C++ compiler."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import build

from .. import checks
from ..call import Call, Gradients, Need, Outputs, Step
from . import aten

SOURCE = "causal_conv/cpu/convolve.cpp"
Steps = tuple[int, ...]  # the numbers of build.Steps


class Arguments(build.Arguments):
    """struct Call of convolve.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("time", "sequences", "channels", "taps", "held", "silu", "threads")),
        *((name, ctypes.c_void_p) for name in ("offsets", "slots", "bias")),
        *((name, build.Steps) for name in ("weight", "x", "o", "initial", "last", "dx", "dinitial")),
        *((name, ctypes.c_void_p) for name in ("dweight", "dbias")),
    )


def forward(c: Call) -> Outputs:
    """o [B, T, D] in x's dtype, and the last W - 1 steps in float32."""
    checks.eager(c)
    library = build.library(SOURCE, c.x)
    if library is None:
        return aten.forward(c)
    x, initial = c.x, build.float32(c.initial_state)
    o = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = x.new_empty(c.state_shape, dtype=torch.float32) if c.output_final_state else None
    tensors = (_steps(x), _steps(o), _states(initial), _states(last))
    _run(library.convolve_forward, c, x.shape[1], tensors, offsets=build.offsets(c))
    return Outputs(o, last)


def backward(c: Call, d: Outputs, need: Need) -> Gradients:
    """The sums before the activation run again along time; the gradient of each step's rows with them."""
    library = build.library(SOURCE, c.x, d.o)
    if library is None:
        return aten.backward(c, d, need)
    x, initial, last = c.x, build.float32(c.initial_state), build.float32(d.final_state)
    (channels, taps), sequences = c.weight.shape, c.sequences
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need.x else None
    dinitial = x.new_empty(c.state_shape, dtype=torch.float32) if need.initial_state else None
    dweight = x.new_empty((sequences, taps, channels), dtype=torch.float32) if need.weight else None
    dbias = x.new_empty((sequences, channels), dtype=torch.float32) if need.bias else None
    tensors = (_steps(x), _steps(d.o), _states(initial), _states(last), _steps(dx), _states(dinitial))
    _run(library.convolve_backward, c, x.shape[1], tensors, dweight, dbias, offsets=build.offsets(c))
    return (
        dx,
        None if dweight is None else dweight.sum(0).mT.contiguous().to(c.weight.dtype),
        None if dbias is None else dbias.sum(0).to(c.bias.dtype),
        None if dinitial is None else dinitial.to(c.initial_state.dtype),
    )


def step(c: Step) -> Tensor:
    """One step for N sequences: rows of the pool updated in place."""
    checks.eager_step(c)
    library = build.library(SOURCE, c.x, c.state)
    if library is None:
        return aten.step(c)
    rows = None if c.slots is None else torch.tensor(valid.slot_values(c.slots, len(c.state)))
    o = torch.empty_like(c.x, memory_format=torch.contiguous_format)
    _run(library.convolve_step, c, 1, (_step(c.x), _step(o), _states(c.state)), slots=rows)
    return o


def _run(
    kernel: Any,
    c: Any,
    time: int,
    tensors: tuple[Steps, ...],
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    offsets: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """One call of convolve.cpp, with x, o, both states and their gradients.

    C++ gets raw addresses, so each temporary needs a name that keeps it alive.
    """
    (channels, taps), batch = c.weight.shape, c.x.shape[0]
    weight, bias = c.weight if c.weight.dtype in build.DTYPES else c.weight.float(), build.float32(c.bias)
    held = taps - 1 if isinstance(c, Call) else c.state.shape[2]
    absent = build.NOTHING * (6 - len(tensors))
    arguments = Arguments.of(
        *(time, batch if offsets is None else len(offsets) - 1, channels, taps, held),
        *(c.activation is not None, build.threads(batch * time * channels * taps)),
        *build.addresses(offsets, slots, bias),
        *_view(weight, 0, weight.stride(1), weight.stride(0)),
        *(number for x in tensors for number in x),
        *absent,
        *build.addresses(dweight, dbias),
    )
    kernel(ctypes.byref(arguments))


def _steps(x: Tensor | None) -> Steps:
    """[B, T, D]."""
    return build.NOTHING if x is None else _view(x, *x.stride())


def _step(x: Tensor) -> Steps:
    """[N, D] as one step each."""
    return _view(x, x.stride(0), 0, x.stride(1))


def _states(x: Tensor | None) -> Steps:
    """[N, D, S] as S steps each."""
    return build.NOTHING if x is None else _view(x, x.stride(0), x.stride(2), x.stride(1))


def _view(x: Tensor, sequence: int, step: int, channel: int) -> Steps:
    return x.data_ptr(), build.DTYPES[x.dtype], sequence, step, 0, channel
