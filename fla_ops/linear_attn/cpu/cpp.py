"""The normalisation on a CPU: the C++ kernel of this folder, or ATen for float64 or without a C++ compiler."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import build

from .. import checks
from ..call import Gradients, Need, Normalize, Normalized, NormalizeStep
from . import aten

SOURCE = "linear_attn/cpu/normalize.cpp"


class Arguments(build.Walks):
    """struct Call of normalize.cpp."""

    _fields_ = (
        *((name, build.Steps) for name in ("q", "k", "o", "y", "z", "dq", "dk", "do")),
        ("dz", ctypes.c_void_p),
    )


def forward(c: Normalize) -> Normalized:
    """The quotient [B, T, H, V] in o's dtype, and the last z [N, 1, H, K] in float32."""
    checks.eager(c)
    library = build.library(SOURCE, c.o)
    if library is None:
        return aten.forward(c)
    y = torch.empty_like(c.o, memory_format=torch.contiguous_format)
    z = _sums(c, c.initial_z, c.o)
    steps = build.steps(c.q, c.k, c.o, y, z, None, None, None)
    _run(library.normalize_forward, c, _lead(c), steps, offsets=build.offsets(c))
    return Normalized(y, z if c.output_final_z else None)


def backward(c: Normalize, d: Normalized, need: Need, saved: Normalized) -> Gradients:
    """The gradients that are needed."""
    y = saved.normalized
    library = build.library(SOURCE, y)
    if library is None:
        return aten.backward(c, d, need, saved)
    dq, dk = (build.for_each_head(x, y) if wanted else None for wanted, x in ((need.q, c.q), (need.k, c.k)))
    do = torch.empty_like(y, memory_format=torch.contiguous_format) if need.o else None
    z = _sums(c, c.initial_z, y)
    dz = _sums(c, d.final_z, y) if need.k or need.initial_z else None
    steps = build.steps(c.q, c.k, d.normalized, y, z, dq, dk, do)
    _run(library.normalize_backward, c._replace(o=y), _lead(c), steps, dz, build.offsets(c))
    dq, dk = (None if x is None else build.sum_groups(x, like) for x, like in ((dq, c.q), (dk, c.k)))
    return dq, dk, do, dz.to(c.initial_z.dtype) if need.initial_z else None


def step(c: NormalizeStep) -> Tensor:
    """One step for N sequences: rows of z updated in place."""
    checks.eager_step(c)
    library = build.library(SOURCE, c.o, c.z)
    if library is None:
        return aten.step(c)
    rows = None if c.slots is None else torch.tensor(valid.slot_values(c.slots, len(c.z)))
    y = torch.empty_like(c.o, memory_format=torch.contiguous_format)
    steps = [*build.one_step(c.q, c.k, c.o, y), *build.steps(c.z), *build.NOTHING * 3]
    _run(library.normalize_forward, c, (1, len(c.o), False), steps, slots=rows)
    return y


def _sums(c: Normalize, z: Tensor | None, o: Tensor) -> Tensor:
    """A fresh [N, 1, H, K] in float32 from a sum of the call, or zeros."""
    if z is not None:
        return z.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return o.new_zeros((c.sequences, 1, o.shape[2], c.q.shape[3]), dtype=torch.float32)


def _lead(c: Normalize) -> tuple[int, int, bool]:
    return c.q.shape[1], c.sequences, c.reverse


def _run(
    kernel: Any,
    c: Normalize | NormalizeStep,
    lead: tuple[int, int, bool],
    steps: list[int],
    dz: Tensor | None = None,
    offsets: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """One call of normalize.cpp. `lead` is the time, the number of sequences and whether time runs backwards; dz is the
    gradient of z.

    C++ gets raw addresses, so the caller has names that keep the tensors alive.
    """
    time, sequences, reverse = lead
    (key_heads, key_width), (heads, value_width) = c.q.shape[-2:], c.o.shape[-2:]
    arguments = Arguments.of(
        *(time, sequences, key_heads, heads, key_width, value_width),
        *(reverse, build.threads(c.o.numel() // value_width * (key_width + value_width))),
        c.factor,
        *build.addresses(offsets, slots),
        *steps,
        *build.addresses(dz),
    )
    kernel(ctypes.byref(arguments))
