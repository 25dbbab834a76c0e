"""Decides whether an ATen body sees the sequences of a call one by one or all at once.

A matrix product has other last bits for one matrix than for a batch of them. So a body that can read its values runs
for each sequence on its own, as a dense batch of one, and a sequence has the same bits alone, in a batch and in a pack.
Code that is traced can neither read offsets nor loop over a batch whose size is symbolic: there, the same body takes
the whole call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fla_ops import validation as valid

Span = dict[str, slice]  # where one sequence lies, by the axis letters that tell sequences apart


def is_traced(x: Tensor) -> bool:
    """Whether a graph is being recorded: sizes may be symbolic, and values cannot be read."""
    return isinstance(x, FunctionalTensor | FakeTensor)


def for_rows(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of rows [R], shaped to meet x [R, ...]."""
    return mask.reshape(-1, *[1] * (x.dim() - 1))


def one_by_one(body: Callable[..., Sequence[Any]], c: Any, names: Sequence[str], *given: Any) -> list[Any]:
    """`body(c, *given)`, sequence by sequence where values can be read. `names` are those of its results in `c.axes`.

    Results without an axis that tells sequences apart are added up.
    """
    if is_traced(c[0]) or (c.cu_seqlens is None and c[0].shape[0] <= 1):
        return list(body(c, *given))
    results = [body(*(_cut(x, c.axes, span) for x in (c, *given))) for span in _spans(c)]
    return [_join(c, name, parts) for name, parts in zip(names, zip(*results, strict=True), strict=True)]


def _spans(c: Any) -> list[Span]:
    if c.cu_seqlens is None:
        return [{"B": slice(n, n + 1), "N": slice(n, n + 1)} for n in range(c[0].shape[0])]
    return [{"T": slice(a, b), "N": slice(n, n + 1)} for n, (a, b) in enumerate(itertools.pairwise(_offsets(c)))]


def _offsets(c: Any) -> list[int]:
    return valid.cu_seqlens_values(c.cu_seqlens, c[0].shape[1])


def _cut(x: Any, axes: Any, span: Span) -> Any:
    """The fields of one sequence, which is no pack."""

    def part(name: str, value: Any) -> Any:
        if name.startswith("cu_seqlens"):
            return None
        if not isinstance(value, Tensor):
            return value
        return value[tuple(span.get(letter, slice(None)) for letter in valid.letters_of(axes[name]))]

    return x._make(part(name, value) for name, value in zip(x._fields, x, strict=True))


def _join(c: Any, name: str, parts: Sequence[Tensor | None]) -> Tensor | None:
    """The inverse of _cut, for one result of every sequence."""
    found = [x for x in parts if x is not None]
    if not found:
        return None
    letters = valid.letters_of(c.axes[name])
    telling = [letter for letter in letters if letter in ("N", "C", "B" if c.cu_seqlens is None else "T")]
    if not telling:
        return torch.stack(found).sum(0)
    if telling == ["T", "T"]:  # what steps have with steps: none across sequences
        offsets = _offsets(c)
        found = [
            torch.nn.functional.pad(x, (a, offsets[-1] - a - x.shape[-1]))
            for a, x in zip(offsets[:-1], found, strict=True)
        ]
    return torch.cat(found, letters.index(telling[0]))
