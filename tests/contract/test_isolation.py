"""A NaN stays in its sequence, and in its head: all others are the same bits as without it, forward and backward.

It reaches others through padding that keeps what an earlier sequence left there, through products over a batch in which
a zero is meant to hide it, and through code that reads values to choose its way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fla_ops.validation import letters_of
from tests.cases import COMBINATION, EXPORT, Case, Inputs, cases
from tests.contract.helpers import Named, cotangents, detached, evaluate, params, same_bits

HEADS = ("HK", "H", "HQ", "D")
Spans = Mapping[str, slice | list[int]]  # for each axis letter what is poisoned of it

WIDE = [case for case in cases(tag=EXPORT) if "cu_seqlens" not in case.given]
SELECTED = [
    *params(cases(tag=COMBINATION), dtypes=[torch.float32, torch.float64]),
    *params(WIDE, dtypes=[torch.float64]),
]


def first_sequence(inputs: Inputs) -> Spans:
    """What belongs to the first sequence that has steps."""
    if "cu_seqlens" in inputs:
        offsets = inputs["cu_seqlens"].tolist()
        n = next(n for n in range(len(offsets) - 1) if offsets[n] < offsets[n + 1])
        return {"T": slice(offsets[n], offsets[n + 1]), "N": slice(n, n + 1)}
    if "slots" in inputs:
        n = next(n for n, row in enumerate(inputs["slots"].tolist()) if row >= 0)
        return {"N": slice(n, n + 1), "P": [int(inputs["slots"][n])]}
    return {letter: slice(0, 1) for letter in ("B", "N", "P")}


def first_heads(case: Case) -> Spans:
    """A head of the kind that there are fewest of, and those that share it."""
    sizes = {letter: case.sizes[letter] for letter in HEADS if letter in case.sizes}
    return {letter: slice(0, size // min(sizes.values())) for letter, size in sizes.items()}


def part(case: Case, name: str, spans: Spans) -> tuple[slice | list[int], ...] | None:
    """Where what is poisoned lies in an input, an output or a gradient; None where all of a tensor depends on it."""
    letters = letters_of(case.axes[name if name in case.axes else name.removeprefix("d")])
    if not any(letter in spans for letter in letters):
        return None
    return tuple(spans.get(letter, slice(None)) for letter in letters)


def filled(case: Case, values: Mapping[str, Any], spans: Spans, number: float) -> dict[str, Any]:
    """The values with a number in the part of every floating tensor that `spans` names."""
    changed = dict(values)
    for name, x in values.items():
        if isinstance(x, Tensor) and x.is_floating_point() and (index := part(case, name, spans)) is not None:
            changed[name] = x.detach().clone(memory_format=torch.preserve_format)
            changed[name][index] = number
    return changed


def check(case: Case, inputs: Inputs, spans: Spans) -> None:
    """What is poisoned changes nothing outside of it."""
    clean = evaluate(case, inputs, wanted=())
    arriving = cotangents(detached(clean))
    expected = evaluate(case, inputs, arriving=arriving)
    poison = float("nan")
    found: Named = evaluate(case, filled(case, inputs, spans, poison), arriving=filled(case, arriving, spans, poison))
    others = [name for name, x in expected.items() if x is not None and part(case, name, spans) is not None]
    assert others, "nothing is compared"
    found, expected = (filled(case, values, spans, 0.0) for values in (found, expected))
    different = [name for name in others if not same_bits(found[name], expected[name])]
    assert not different, f"NaN in {dict(spans)} changes others of {', '.join(different)}"


@pytest.mark.parametrize(("case", "device", "dtype"), SELECTED)
def test_a_sequence_keeps_its_nan(case: Case, device: str, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, device)
    check(case, inputs, first_sequence(inputs))


@pytest.mark.parametrize(("case", "device", "dtype"), SELECTED)
def test_a_head_keeps_its_nan(case: Case, device: str, dtype: torch.dtype) -> None:
    check(case, case.inputs(dtype, device), first_heads(case))
