"""The sequences of a call, each computed on its own.

How a library rounds a matrix product may depend on how many matrices it is given. So no product of this folder spans
sequences, and a sequence has the same bits alone, in a batch and in a pack.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from fla_ops import validation as valid

from ..call import Call, Gradients, Need
from . import abc


class Place(NamedTuple):
    """Where a sequence lies: the number of its states, its row of the batch, and its steps."""

    n: int
    row: int
    steps: slice

    def of(self, x: Tensor) -> Tensor:
        """The sequence's part [T, ...] of x [B, T, ...]."""
        return x[self.row, self.steps]


def places(c: Call) -> list[Place]:
    """Every sequence of the batch or of the pack."""
    batch, time = c.q.shape[:2]
    if c.cu_seqlens is None:
        return [Place(n, n, slice(0, time)) for n in range(batch)]
    offsets = valid.cu_seqlens_values(c.cu_seqlens, time)
    return [Place(n, 0, slice(a, b)) for n, (a, b) in enumerate(itertools.pairwise(offsets))]


def alone(c: Call, at: Place) -> Call:
    """The call of one sequence without the batch's axis, q [T, HQ, K] and initial_k [H, K, M]; it always has gates."""
    q, k, v, s = (at.of(x) for x in c[:4])
    s, g = abc.gates(s, c.reverse) if c.g is None else (s, at.of(c.g))
    initial_k, initial_v = (None if x is None else x[at.n] for x in (c.initial_k, c.initial_v))
    return c._replace(q=q, k=k, v=v, s=s, g=g, scale=c.factor, initial_k=initial_k, initial_v=initial_v)


def empty_states(c: Call, wanted: bool) -> tuple[Tensor | None, ...]:
    """Both final states, to be filled, if they are wanted."""
    dtype = valid.state_dtype(c.v)
    return tuple(c.v.new_empty(shape, dtype=dtype) if wanted else None for shape in c.state_shapes)


def empty_gradients(c: Call, need: Need) -> Gradients:
    """The gradients that are needed, to be filled, each in the dtype of its input."""
    inputs = (getattr(c, name) for name in need._fields)
    return Gradients._make(
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
        for x, wanted in zip(inputs, need, strict=True)
    )
