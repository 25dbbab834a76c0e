"""Forward and every gradient against the reference in float64, by the rule of tests/numerics.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import numerics
from tests.cases import COMBINATION, EXPORT, Case, Inputs, cases, widened
from tests.contract.helpers import (
    DEVICES,
    DTYPES,
    Named,
    cotangents,
    detached,
    differentiable,
    evaluate,
    is_backward,
    is_typical,
    labelled,
    operators,
    params,
    parts,
    requiring,
    with_parts,
    with_slow,
)

SCENARIOS = [case for case in cases() if COMBINATION not in case.tags]


def check_numbers(case: Case, device: str, dtype: torch.dtype) -> None:
    """The operator's results against the reference's, in float64 and in the same dtype."""
    inputs = case.inputs(dtype, device)
    results = evaluate(case, inputs)
    arriving = cotangents({name: results[name] for name in results if not name.startswith("d")})

    def reference(given: Inputs) -> tuple[Any, ...]:
        return case.reference(**given)

    references = evaluate(case, inputs, reference, arriving)
    truths = evaluate(case, widened(inputs), reference, arriving)
    numerics.check(results, references, truths, dtype)


def is_quick(case: Case, dtype: torch.dtype) -> bool:
    """A precision of each kind, and all of them in one case of each operator."""
    return dtype in (torch.float32, torch.bfloat16) or is_typical(case)


@pytest.mark.parametrize(("case", "device", "dtype"), params(SCENARIOS, dtypes=DTYPES["cpu"], quick=is_quick))
def test_scenario(case: Case, device: str, dtype: torch.dtype) -> None:
    check_numbers(case, device, dtype)


@pytest.mark.parametrize(("case", "device", "dtype"), params(cases(tag=COMBINATION), dtypes=[torch.float32]))
def test_combination_of_optional_inputs(case: Case, device: str, dtype: torch.dtype) -> None:
    check_numbers(case, device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", cases(tag=EXPORT), ids=str)
def test_every_length_up_to_two_chunks_and_a_step(case: Case, device: str) -> None:
    letter = "T" if "T" in case.sizes else "N"
    for size in range(34) if letter == "T" else range(8):
        check_numbers(case.resized(**{letter: size}), device, torch.float32)


@pytest.mark.parametrize("case", with_slow(differentiable(COMBINATION), is_typical))
def test_gradcheck(case: Case) -> None:
    inputs = requiring(case.inputs(torch.float64), case.trained)
    trained = tuple(inputs[name] for name in case.trained)

    def function(*values: Any) -> tuple[Any, ...]:
        outputs = case.call(inputs | dict(zip(case.trained, values, strict=True)))
        return tuple(y for _, y in labelled(case.outputs, outputs) if y is not None)

    assert torch.autograd.gradcheck(function, trained, fast_mode=True)


@pytest.mark.parametrize("case", with_parts(EXPORT, "_backward"), ids=str)
def test_a_gradient_that_is_not_asked_for_costs_nothing(case: Case) -> None:
    inputs = case.inputs()
    every = evaluate(case, inputs)
    for name in case.trained:
        (call,) = [c for c in parts(case, inputs, wanted=[name]) if is_backward(c.name)]
        computed = [y for y in call.outputs if y is not None]
        assert len(computed) == 1, f"for {name} alone, {len(computed)} gradients were computed"
        alone = evaluate(case, inputs, wanted=[name])
        numerics.close(alone[f"d{name}"], every[f"d{name}"])


@pytest.mark.parametrize("case", differentiable(COMBINATION), ids=str)
def test_the_gradient_does_not_reach_what_has_none(case: Case) -> None:
    inputs = case.inputs()
    floating = [n for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    assert set(floating) == set(case.trained), "every floating input of an operator with a gradient has one"


@pytest.mark.parametrize(
    ("case", "output"),
    [
        pytest.param(case, i, id=f"{name}-only-{case}")
        for case in differentiable(EXPORT)
        for i, name in enumerate(case.outputs)
    ],
)
def test_gradient_of_one_output(case: Case, output: int) -> None:
    inputs = case.inputs()
    arriving = cotangents(detached(evaluate(case, inputs, wanted=())))
    assert len(arriving) == len(case.outputs), f"the {EXPORT} case of {case.operator} returns {list(arriving)}"

    def only(function: Any) -> Any:
        return lambda given: tuple(y if i == output else None for i, y in enumerate(function(given)))

    def reference(given: Inputs) -> tuple[Any, ...]:
        return case.reference(**given)

    results = evaluate(case, inputs, only(case.call), arriving)
    references = evaluate(case, inputs, only(reference), arriving)
    truths = evaluate(case, widened(inputs), only(reference), arriving)
    numerics.check(results, references, truths, torch.float32)


@pytest.mark.parametrize("case", differentiable(EXPORT), ids=str)
def test_gradients_may_arrive_with_any_strides(case: Case) -> None:
    inputs = case.inputs()
    contiguous = cotangents(detached(evaluate(case, inputs, wanted=())))
    strided: Named = {name: None if x is None else x.mT.contiguous().mT for name, x in contiguous.items()}
    constant: Named = {name: None if x is None else x.new_ones(()).expand(x.shape) for name, x in contiguous.items()}
    ones: Named = {name: None if x is None else torch.ones_like(x) for name, x in contiguous.items()}
    for found, expected in ((strided, contiguous), (constant, ones)):
        results, references = evaluate(case, inputs, arriving=found), evaluate(case, inputs, arriving=expected)
        for name in references:
            numerics.close(results[name], references[name])


@pytest.mark.parametrize(
    ("dtype", "wide"), [(d, {torch.float64: torch.float64}.get(d, torch.float32)) for d in DTYPES["cpu"]], ids=str
)
@pytest.mark.parametrize("operator", operators("differentiable", "composite"), ids=lambda op: op.name)
def test_dtypes(operator: Any, dtype: torch.dtype, wide: torch.dtype) -> None:
    """The first output is in the activations' dtype, states are wide, a gradient is in its input's dtype."""
    for case in cases(operator.name, EXPORT):
        inputs = case.inputs(dtype)
        results = evaluate(case, inputs)
        assert results[case.outputs[0]].dtype is dtype
        for name, y in results.items():
            if y is not None and name.startswith("final"):
                assert y.dtype is wide, name
        for name in case.trained:
            assert results[f"d{name}"].dtype is inputs[name].dtype, name
