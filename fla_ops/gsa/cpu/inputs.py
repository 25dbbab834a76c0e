"""What the C++ kernels of gsa are given: gates for every call, dtypes that they know, fresh states."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.common.cpu import build

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


def states_of(c: Call, state_k: Tensor | None, state_v: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fresh states [N, H, K, M] and [N, H, M, V] in float32; zeros where none is given."""
    first, second = (
        c.v.new_zeros(shape, dtype=torch.float32)
        if state is None
        else state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for state, shape in zip((state_k, state_v), c.state_shapes, strict=True)
    )
    return first, second
