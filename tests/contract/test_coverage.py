"""What an operator still lacks, by name: cases, tags, refusals. The other contract tests run over those."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fla_ops
from fla_ops.validation import letters_of
from tests.cases import COMBINATION, EXPORT, INDUCTOR, SMALL, Case, cases
from tests.contract.helpers import differentiable, is_public, operators, parts, whole
from tests.refusals import refusals

OPERATORS = pytest.mark.parametrize("operator", operators(), ids=lambda op: op.name)


def optional(operator: fla_ops.Operator) -> list[Any]:
    """Arguments that a call may leave out."""
    return [a for a in operator.overload._schema.arguments if a.has_default_value() or "Optional" in str(a.type)]


@OPERATORS
def test_operator_has_cases_of_every_kind(operator: fla_ops.Operator) -> None:
    found = cases(operator.name)
    missing = [tag for tag in (COMBINATION, INDUCTOR, EXPORT, SMALL) if not any(tag in c.tags for c in found)]
    assert not missing, f"{operator.name} has no case with the tags {missing}: see tests/cases.py"
    assert len(cases(operator.name, EXPORT)) == 1, f"{operator.name} should have one case with the tag {EXPORT}"


@OPERATORS
def test_every_optional_input_is_given_in_some_case_and_absent_in_another(operator: fla_ops.Operator) -> None:
    found = [(case, case.inputs()) for case in cases(operator.name)]
    lacking = []
    for argument in optional(operator):
        values = [inputs.get(argument.name, argument.default_value) for _, inputs in found]
        is_default = [type(x) is type(argument.default_value) and x == argument.default_value for x in values]
        if not any(is_default):
            lacking.append(f"{argument.name} is always given")
        if all(is_default):
            lacking.append(f"{argument.name} is never given")
    assert not lacking, f"{operator.name}: {', '.join(lacking)}"


@OPERATORS
def test_every_tensor_argument_has_refusals(operator: fla_ops.Operator) -> None:
    """On another device, in another dtype, with another number of axes, and of each size that other tensors share."""
    lacking = []
    rows = [r for r in refusals() if r.case.operator == operator.name]
    for name in operator.declaration.tensors:
        pairs = [(r.case, r.case.inputs()[name], r.inputs()[name]) for r in rows if list(r.change) == [name] and r.kind]
        kinds = ("device", "dtype", "ndim")
        lacking += [f"{name} of another {k}" for k in kinds if all(getattr(x, k) == getattr(y, k) for _, x, y in pairs)]
        case, x, _ = pairs[0]
        changed = {i for _, _, y in pairs if y.dim() == x.dim() for i in range(x.dim()) if y.shape[i] != x.shape[i]}
        unchanged = [letter for i, letter in enumerate(letters_of(case.axes[name])) if i not in changed]
        lacking += [f"{name} of another {letter}" for letter in unchanged if is_shared(case, name, letter)]
    assert not lacking, f"{operator.name} has no refusal of {', '.join(lacking)}: see tests/refusals.py"


def is_shared(case: Case, name: str, letter: str) -> bool:
    """Whether another tensor of a call has an axis of this letter."""
    return any(letter in letters_of(case.axes[x]) for x in case.declaration.tensors if x in case.given - {name})


def test_every_differentiable_operator_has_a_case_with_a_gradient() -> None:
    tested = {case.operator for case in differentiable(COMBINATION)}
    missing = [op.name for op in operators("differentiable") if op.name not in tested]
    assert not missing, f"no case of {missing} names differentiable inputs"


def test_every_operator_that_people_do_not_call_is_a_part_of_one_that_they_do() -> None:
    orphans = {name for name in fla_ops.ops() if not is_public(name) and whole(name) is None}
    if orphans:  # then some case must reach it
        calls = (parts(case, case.inputs()) for case in cases(tag=COMBINATION))
        orphans -= {call.name for found in calls for call in found}
    assert not orphans, f"{orphans} are reached through no case, and have no public function in fla_ops"


def test_cases_name_operators_that_exist() -> None:
    known = {op.name for op in operators()}
    assert {case.operator for case in cases()} == known


@pytest.mark.parametrize("operator", operators(), ids=lambda op: op.name)
def test_cases_describe_what_they_hold(operator: fla_ops.Operator) -> None:
    """Axis letters agree with the sizes: what a wrong description would hide from the tests that cut along an axis."""
    for case in cases(operator.name):
        inputs, sizes = case.inputs(), {"1": 1, "2": 2, **case.sizes}
        if "offsets" in sizes and "cu_seqlens" in case.given:
            sizes |= {"B": 1, "T": sizes["offsets"][-1], "N": len(sizes["offsets"]) - 1, "N+1": len(sizes["offsets"])}
        elif "B" in sizes:
            sizes["N"] = sizes["B"]
        named = inputs | dict(zip(case.outputs, case.call(inputs), strict=True))
        for name, x in named.items():
            if isinstance(x, torch.Tensor):
                letters = letters_of(case.axes[name])
                assert tuple(sizes[letter] for letter in letters) == tuple(x.shape), f"{name} of {case}"
