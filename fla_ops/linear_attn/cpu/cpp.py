"""The normalisation on a CPU: the C++ kernel of this folder, or ATen for float64 and where no C++ compiler is."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import build as compiled

from .. import checks
from . import aten
from .chunked import scale_of

SOURCE = "linear_attn/cpu/normalize.cpp"


class Call(compiled.Walks):
    """struct Call of normalize.cpp."""

    _fields_ = (
        *((name, compiled.Steps) for name in ("q", "k", "o", "y", "z", "dq", "dk", "do")),
        ("dz", ctypes.c_void_p),
    )


def forward(q, k, o, scale, initial_z, output_final_z, reverse, cu_seqlens, cu_seqlens_cpu):
    """The quotient [B, T, H, V] in o's dtype, and the last z [N, 1, H, K] in float32."""
    library = compiled.library(SOURCE, o)
    if library is None:
        return aten.forward(q, k, o, scale, initial_z, output_final_z, reverse, cu_seqlens, cu_seqlens_cpu)
    checks.launch(q, k, o, initial_z, cu_seqlens, cu_seqlens_cpu)
    y = torch.empty_like(o, memory_format=torch.contiguous_format)
    z = _sums(initial_z, q, o, cu_seqlens)
    _run(library.normalize_forward, q, k, o, y, z, scale, reverse, compiled.offsets(cu_seqlens, q))
    return y, z if output_final_z else None


def backward(q, k, normalized, initial_z, cu_seqlens, dnormalized, dfinal_z, scale, reverse, output_mask):
    """The gradients of q, k, o and initial_z that output_mask asks for."""
    library = compiled.library(SOURCE, normalized)
    if library is None:
        gradients = (dnormalized, dfinal_z)
        return aten.backward(q, k, normalized, initial_z, cu_seqlens, *gradients, scale, reverse, output_mask)
    need_q, need_k, need_o, need_z = output_mask
    dq, dk = (compiled.for_each_head(x, normalized) if wanted else None for wanted, x in ((need_q, q), (need_k, k)))
    do = torch.empty_like(normalized, memory_format=torch.contiguous_format) if need_o else None
    z = _sums(initial_z, q, normalized, cu_seqlens)
    dz = _sums(dfinal_z, q, normalized, cu_seqlens) if need_k or need_z else None
    sums = (z, scale, reverse, compiled.offsets(cu_seqlens, q), None)
    _run(library.normalize_backward, q, k, dnormalized, normalized, *sums, dz, dq, dk, do)
    dq, dk = (None if d is None else compiled.sum_groups(d, x) for d, x in ((dq, q), (dk, k)))
    return dq, dk, do, dz.to(initial_z.dtype) if need_z else None


def step(q, k, o, z, scale, slots):
    """One step for N sequences: rows of z updated in place."""
    library = compiled.library(SOURCE, o, z)
    if library is None:
        return aten.step(q, k, o, z, scale, slots)
    checks.launch_step(q, k, o, z, slots)
    rows = None if slots is None else torch.tensor(valid.slot_values(slots, len(z)))
    y = torch.empty_like(o, memory_format=torch.contiguous_format)
    once = (x.unsqueeze(1) for x in (q, k, o, y))
    _run(library.normalize_forward, *once, z, scale, False, None, rows)
    return y


def _sums(z: Tensor | None, q: Tensor, o: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A fresh [N, 1, H, K] in float32; zeros where there is none."""
    if z is not None:
        return z.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    return o.new_zeros((sequences, 1, o.shape[2], q.shape[3]), dtype=torch.float32)


def _run(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    o: Tensor,
    y: Tensor,
    z: Tensor,
    scale: float | None,
    reverse: bool,
    offsets: Tensor | None,
    slots: Tensor | None = None,
    *gradients: Tensor | None,
) -> None:
    """One call of normalize.cpp; the gradients are those of z, q, k and o."""
    dz, dq, dk, do = gradients or (None,) * 4
    (batch, time, key_heads, key_width), (heads, value_width) = q.shape, o.shape[2:]
    call = Call(
        *(time, batch if offsets is None else len(offsets) - 1, key_heads, heads, key_width, value_width),
        *(reverse, compiled.threads(batch * time * heads * (key_width + value_width))),
        scale_of(q, scale),
        *(compiled.address(x) for x in (offsets, slots)),
        *(compiled.steps(x) for x in (q, k, o, y, z, dq, dk, do)),
        compiled.address(dz),
    )
    kernel(ctypes.byref(call))
