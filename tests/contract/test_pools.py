"""What is updated in place: autograd is told, inference tensors stay in inference mode, and no memory is shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.cases import EXPORT, Case, Inputs, cases, results
from tests.contract.helpers import assert_same_bits, labelled

UPDATING = [case for case in cases(tag=EXPORT) if case.mutated]
POOLS = pytest.mark.parametrize(("case", "pool"), [(case, name) for case in UPDATING for name in case.mutated], ids=str)
EVERY = pytest.mark.parametrize("case", UPDATING, ids=str)
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def runner(case: Case, compiled: bool) -> Callable[[Inputs], Any]:
    """A call of the operator."""

    def run(inputs: Inputs) -> Any:
        return case.overload(**inputs)

    return torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run


@COMPILED
@EVERY
@pytest.mark.usefixtures("fresh_compiler")
def test_the_version_of_every_pool_rises(case: Case, compiled: bool) -> None:
    inputs = case.inputs()
    before = {name: x._version for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    runner(case, compiled)(inputs)
    risen = {name for name, version in before.items() if inputs[name]._version > version}
    assert risen == set(case.mutated)


@COMPILED
@POOLS
@pytest.mark.usefixtures("fresh_compiler")
def test_a_gradient_that_saved_a_pool_before_is_refused(case: Case, pool: str, compiled: bool) -> None:
    inputs = case.inputs()
    product = (torch.ones((), requires_grad=True) * inputs[pool]).sum()  # saves the pool
    runner(case, compiled)(inputs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@POOLS
def test_an_inference_tensor_is_not_updated_outside_inference_mode(case: Case, pool: str) -> None:
    inputs = case.inputs()
    with torch.inference_mode():
        inputs[pool] = inputs[pool].clone()
    before = inputs[pool].clone()
    with pytest.raises(RuntimeError, match=rf"updates {pool} in place, which is an inference tensor"):
        case.overload(**inputs)
    assert torch.equal(inputs[pool], before)


@EVERY
def test_inference_tensors_are_updated_in_inference_mode(case: Case) -> None:
    with torch.inference_mode():
        inputs = case.inputs()
        outputs = case.overload(**inputs)
        found = dict(labelled(case.outputs, (*results(outputs), *(inputs[name] for name in case.mutated))))
    assert_same_bits(found, dict(labelled(case.outputs, case.call(case.inputs()))))


def expanded(x: torch.Tensor) -> torch.Tensor:
    """One row that stands for all."""
    return x[:1].expand_as(x)


def overlapping(x: torch.Tensor) -> torch.Tensor:
    """Rows that begin one element after each other."""
    return x.as_strided(x.shape, (1, *x.stride()[1:]))


@pytest.mark.parametrize("overlap", [expanded, overlapping], ids=lambda f: f.__name__)
@POOLS
def test_a_pool_whose_elements_share_memory_is_refused(case: Case, pool: str, overlap: Any) -> None:
    inputs = case.inputs()
    inputs[pool] = overlap(inputs[pool])
    before = inputs[pool].clone()
    with pytest.raises(ValueError, match=rf"{pool} is updated in place: no two of its elements may share memory, got"):
        case.overload(**inputs)
    assert torch.equal(inputs[pool], before)


def interleaved(case: Case, inputs: Inputs, apart: bool) -> Inputs:
    """The pools with every other element of one buffer each, or on top of each other."""
    pools = [inputs[name] for name in case.mutated]
    buffer = pools[0].new_empty(len(pools) * max(x.numel() for x in pools))
    views = [
        buffer.as_strided(x.shape, [len(pools) * stride for stride in x.stride()], i if apart else 0)
        for i, x in enumerate(pools)
    ]
    return inputs | {name: view.copy_(x) for name, view, x in zip(case.mutated, views, pools, strict=True)}


PAIRS = pytest.mark.parametrize("case", [case for case in UPDATING if len(case.mutated) > 1], ids=str)


@PAIRS
def test_pools_that_share_memory_are_refused(case: Case) -> None:
    inputs = interleaved(case, case.inputs(), apart=False)
    shared = " and ".join(rf"(?:{'|'.join(case.mutated)})" for _ in range(2))
    shared += " are updated in place: they may not share memory"
    with pytest.raises(ValueError, match=shared):
        case.overload(**inputs)
    contiguous = {name: inputs[name].contiguous() for name in case.mutated}
    smaller, larger = sorted(contiguous, key=lambda name: contiguous[name].numel())
    contiguous[smaller] = contiguous[larger].flatten()[: contiguous[smaller].numel()].view(contiguous[smaller].shape)
    with pytest.raises(ValueError, match=shared):
        case.overload(**(inputs | contiguous))


@PAIRS
def test_pools_that_interleave_without_sharing_are_served(case: Case) -> None:
    inputs = interleaved(case, case.inputs(), apart=True)
    outputs = case.overload(**inputs)
    found = dict(labelled(case.outputs, (*results(outputs), *(inputs[name] for name in case.mutated))))
    assert_same_bits(found, dict(labelled(case.outputs, case.call(case.inputs()))))
