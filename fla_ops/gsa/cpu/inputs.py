"""What the C++ kernels of gsa are given: gates for every call, dtypes that they know, fresh states."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.common.cpu import build
from fla_ops.signature import Size

from ..call import Call
from . import abc
from .sequences import places


def with_gates(c: Call) -> Call:
    """The call itself, or with ABC's weights and gates where it has none."""
    if c.g is not None:
        return c
    s, g = (c.s.new_empty(c.s.shape, dtype=torch.float32) for _ in range(2))
    for at in places(c):
        for whole, part in zip((s, g), abc.gates(at.of(c.s), c.reverse), strict=True):
            at.of(whole).copy_(part)
    return c._replace(s=s, g=g)


def known(x: Tensor) -> Tensor:
    """x, or in float32 where its dtype is not one of the kernels'."""
    return x if x.dtype in build.DTYPES else x.float()


def state_of(c: Call, state: Tensor | None, shape: tuple[Size, ...]) -> Tensor:
    """A fresh state in float32; zeros where none is given."""
    if state is None:
        return c.v.new_zeros(shape, dtype=torch.float32)
    return state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def states_of(c: Call, state_k: Tensor | None, state_v: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both, [N, H, K, M] and [N, H, M, V]."""
    keys, values = c.state_shapes
    return state_of(c, state_k, keys), state_of(c, state_v, values)


def slot_gradient(c: Call, gated: Call, dw: Tensor, dg: Tensor) -> Tensor:
    """The gradient of s for ABC, from those of the weights and gates that `with_gates` made."""
    ds = torch.empty_like(c.s, memory_format=torch.contiguous_format)
    for at in places(c):
        w, g, *gradients = (at.of(x) for x in (gated.s, gated.g, dw, dg))
        at.of(ds).copy_(abc.gradient(w, g, *gradients, c.reverse))
    return ds
