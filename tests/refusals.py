"""Calls that must be refused, and how.

Most are generated: `generated` changes one tensor of a call at a time, in its device, its dtype or one of its axes, and
knows the message from the axes that the operator's call declares. `tests/<family>/refusals.py` has the others in a
list `REFUSALS`: values, modes, arguments that exclude each other, each with its reason as an id.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fla_ops.validation import COUNTED, letters_of, pattern_of
from tests.cases import COMBINATION, EXPORT, Case, Inputs, cases

ACTIVATIONS = ("q", "k", "v", "o", "x", "B", "C")  # these share one dtype
HEADS = ("H", "HK", "HQ")  # of which one is a multiple of another
FLOATS = "float64, float32, bfloat16, float16"
FLOATING = "must be float64, float32, bfloat16 or float16, got int32"
POOL = "must be float32, bfloat16 or float16, got"
INTEGRAL = r"must be int32 or int64, got (torch\.)?float32"

Change = Mapping[str, Any]
Row = tuple[str, Case, Change, type[Exception], str]


@dataclass(frozen=True)
class Refusal:
    """A call that must be refused: a case's call with some arguments changed.

    id       what is wrong
    case     the call before the change
    change   by argument: a new value, or what makes it from the old one
    error    the exception
    message  regular expression that its message matches: what was wanted and what came
    kind     of a generated one: what was changed
    """

    id: str
    case: Case
    change: Change
    error: type[Exception]
    message: str
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.case.operator}-{self.id}"

    def inputs(self) -> Inputs:
        """The arguments of the refused call."""
        inputs = self.case.inputs()
        changed = {name: new(inputs[name]) if callable(new) else new for name, new in self.change.items()}
        return inputs | changed


@cache
def refusals() -> tuple[Refusal, ...]:
    """Every call that must be refused."""
    families = sorted(path.parent.name for path in Path(__file__).parent.glob("*/refusals.py"))
    written = [r for family in families for r in importlib.import_module(f"tests.{family}.refusals").REFUSALS]
    operators = dict.fromkeys(case.operator for case in cases())
    return (*written, *(r for operator in operators for r in generated(operator)))


def by_id(operator: str) -> dict[str, Case]:
    """The cases of an operator by their ids."""
    return {case.id: case for case in cases(operator)}


def to_meta(x: Tensor) -> Tensor:
    """On another device."""
    return x.to("meta")


def offsets(*values: int) -> Callable[[Tensor], Tensor]:
    """Other values, of the old dtype."""
    return lambda old: torch.tensor(values, dtype=old.dtype)


def of_packs(packed: Case) -> list[Row]:
    """Offsets of five sequences over 37 steps whose values are wrong, or which are missing."""
    wrong = ValueError
    rows = [
        ("offsets-of-no-sequence", {"cu_seqlens": lambda x: x[:1]}, r"cu_seqlens must be .* N >= 1, got \(1\)"),
        ("offsets-from-1", {"cu_seqlens": offsets(1, 1, 2, 3, 4, 37)}, "cu_seqlens must start at 0, got 1"),
        ("offsets-past-T", {"cu_seqlens": offsets(0, 1, 2, 3, 4, 38)}, "cu_seqlens must end at T = 37, got 38"),
        ("offsets-short-of-T", {"cu_seqlens": offsets(0, 1, 2, 3, 4, 36)}, "cu_seqlens must end at T = 37, got 36"),
        (
            "offsets-that-fall",
            {"cu_seqlens": offsets(0, 9, 8, 20, 21, 37)},
            "must never fall, got 9 then 8 at position 1",
        ),
    ]
    if "cu_seqlens_cpu" in packed.given:
        rows.append(("host-offsets-alone", {"cu_seqlens": None}, "cu_seqlens_cpu was given without cu_seqlens"))
    return [(reason, packed, change, wrong, message) for reason, change, message in rows]


def beside_a_batch(case: Case, *states: str) -> Row:
    """Offsets, without the states that would have another count."""
    change = {"cu_seqlens": torch.tensor([0, 5, 37]), **dict.fromkeys(states)}
    return ("offsets-beside-a-batch", case, change, ValueError, r"\(cu_seqlens\) need batch B = 1, got B = 2")


def of_slots(pool: Case) -> list[Row]:
    """Slots of four sequences in a pool of nine rows whose values are wrong."""
    rows = [
        ("slot-past-the-pool", offsets(0, 1, 9, 2), r"slots must be -1 or in \[0, P\) with P = 9, got 9"),
        ("slot-below-padding", offsets(0, 1, -2, 2), r"slots must be -1 or in .*, got -2"),
        ("slot-twice", offsets(3, -1, -1, 3), r"slots must differ .* got \[3, -1, -1, 3\]"),
    ]
    return [(reason, pool, {"slots": slots}, ValueError, message) for reason, slots, message in rows]


def of_chunk_size(case: Case) -> list[Row]:
    """What is no power of two, or too small or too large."""
    message = "chunk_size must be a power of two from 16 to 256, got {}"
    return [(f"chunk-of-{n}", case, {"chunk_size": n}, ValueError, message.format(n)) for n in (0, 8, 48, 512)]


def generated(operator: str) -> Iterator[Refusal]:
    """Every tensor argument on another device, in another dtype, with an axis too few, and with each axis that the call
    knows one shorter, or of no width where the message should say so.
    """
    declaration = cases(operator)[0].declaration
    for name in declaration.tensors:
        case = best(operator, name)
        given = {field: x for field, x in case.inputs().items() if isinstance(x, Tensor)}
        yield elsewhere(case, name)
        yield from of_other_dtypes(case, name, given)
        yield from of_other_shapes(case, name, given)


def best(operator: str, name: str) -> Case:
    """The case of an operator in which most is known about an argument."""
    found = []
    for case in cases(operator):
        inputs = case.inputs()
        declared = case.axes == case.declaration.call(**inputs).axes  # a dispatcher may read other axes than its own
        if name in case.given and declared and min(inputs[name].shape) > 0:
            found.append(case)
    return max(found, key=lambda case: (EXPORT in case.tags, COMBINATION not in case.tags, len(case.given)))


def elsewhere(case: Case, name: str) -> Refusal:
    """On another device than the first argument, whose own is the rule; the host's copy belongs on the host."""
    first = case.declaration.fields[0]
    message = {
        first: rf"^\w+ must be on meta like {first}, got cpu$",
        "cu_seqlens_cpu": f"^{name} must be on cpu, got meta$",
    }
    expected = message.get(name, f"^{name} must be on cpu like {first}, got meta$")
    return Refusal(f"{name}-elsewhere", case, {name: to_meta}, ValueError, expected, "device")


def of_other_dtypes(case: Case, name: str, given: Mapping[str, Tensor]) -> Iterator[Refusal]:
    """Activations that differ, integers for gates and states, floats for offsets and slots."""
    if name in ACTIVATIONS:
        shared = [field for field in case.declaration.fields if field in ACTIVATIONS]
        other = "float16" if len(shared) > 1 else "int32"
        got = ", ".join(other if field == name else "float32" for field in shared)
        wrong = {other: f"^{', '.join(shared)} must share one of {FLOATS}, got {got}$"}
    elif given[name].dtype is torch.bool:
        wrong = {"float32": f"^{name} must be bool, got float32$"}
    elif not given[name].is_floating_point():
        wrong = {"float32": f"^{name} {INTEGRAL}$"}
    elif name in case.mutated:
        wrong = {dtype: f"^{name} {POOL} {dtype}$" for dtype in ("int32", "float64")}
    else:
        wrong = {"int32": f"^{name} {FLOATING}$"}
    for dtype, message in wrong.items():
        change = {name: lambda x, dtype=dtype: x.to(getattr(torch, dtype))}
        yield Refusal(f"{dtype}-{name}", case, change, TypeError, message, "dtype")


def of_other_shapes(case: Case, name: str, given: Mapping[str, Tensor]) -> Iterator[Refusal]:
    """An axis too few; each axis that another tensor shares one shorter; each width and head count of none."""
    x, letters = given[name], letters_of(case.axes[name])
    pattern = re.escape(pattern_of(case.axes[name]).replace("N+1", "N + 1"))
    got = rf"(?: = {shown(x.shape)}(?: like cu_seqlens)?)?, got {shown(x.shape[1:])}$"
    yield Refusal(
        f"{name}-of-{x.dim() - 1}-axes",
        case,
        {name: lambda x: x[0]},
        ValueError,
        f"^{name} must be {pattern}{got}",
        "axes",
    )
    for axis, letter in enumerate(letters):
        sharing = [other for other in case.axes if other in given and known(case, letter) in axes_of(case, other)]
        if letter in COUNTED and sharing[0] == name:
            message = f"^{name} must have {letter} >= 1, got {letter} = 0$"
            yield Refusal(f"{name}-of-no-{letter}", case, {name: cut(axis, 0)}, ValueError, message, "none")
        if len(sharing) > 1 or letter.isdigit():
            change = {name: cut(axis, -1)}
            yield Refusal(
                f"{name}-short-in-{letter}",
                case,
                change,
                ValueError,
                mismatch(case, name, axis, given, sharing),
                "shorter",
            )


def cut(axis: int, length: int) -> Callable[[Tensor], Tensor]:
    """The first of an axis; a negative length is what to leave out."""
    return lambda x: x.narrow(axis, 0, length if length >= 0 else x.shape[axis] + length)


def known(case: Case, letter: str) -> str:
    """The letter by which a call knows a size: sequences are counted by their offsets, or else are the batch."""
    first = case.declaration.fields[0]
    if letter in ("N", "N+1") and first in case.axes:
        batched = "B" in letters_of(case.axes[first]) and "cu_seqlens" not in case.given
        return "B" if batched else "N"
    return letter


def axes_of(case: Case, name: str) -> list[str]:
    """The letters of a tensor as the call knows them."""
    return [known(case, letter) for letter in letters_of(case.axes[name])]


def mismatch(case: Case, name: str, axis: int, given: Mapping[str, Tensor], sharing: list[str]) -> str:
    """What is said of an axis that is one shorter: the tensor that comes first has the word, and the next is wrong."""
    letter, first = axes_of(case, name)[axis], letters_of(case.axes[name])[axis].isdigit() or sharing[0] != name
    blamed = name if first else sharing[1]
    x = given[blamed]
    wanted = [
        size - (not first and found == letter) for size, found in zip(x.shape, axes_of(case, blamed), strict=True)
    ]
    came = [size - (first and i == axis) for i, size in enumerate(x.shape)]
    pattern = re.escape(pattern_of(case.axes[blamed]).replace("N+1", "N + 1"))
    like = " like cu_seqlens" * (blamed == "cu_seqlens_cpu")
    message = f"{blamed} must be {pattern} = {shown(wanted)}{like}, got {shown(came)}"
    if letter in HEADS and not first:
        message += rf"|{name} must have a multiple of the \d+ heads of [\w, ]+, got {given[name].shape[axis] - 1} heads"
    return f"^(?:{message})$"


def shown(shape: Any) -> str:
    """A shape as messages show it, for a regular expression."""
    return rf"\({', '.join(map(str, shape))},?\)"
