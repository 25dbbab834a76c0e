"""torch.compile(fullgraph=True), forward and backward: one graph, equal numbers, one compilation for all lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch.fx.experimental import _config as symbolic_shapes

import fla_ops
from tests import numerics
from tests.cases import COMBINATION, EXPORT, INDUCTOR, Case, Inputs, cases, results, tensors
from tests.contract.helpers import (
    assert_close,
    assert_same_bits,
    evaluate,
    is_backward,
    is_composite,
    is_typical,
    operators,
    ours,
    params,
    requiring,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(case: Case, **options: Any) -> Callable[[Inputs], tuple[Any, ...]]:
    """The operator between pointwise operations, as a layer would hold it, compiled as one graph.

    What is not a tensor belongs to the layer: as an input, a float would be a symbol under dynamic=True.
    """
    overload = case.overload
    constants = {name: x for name, x in case.inputs().items() if not tensors(x)}

    def layer(given: Inputs) -> Any:
        computed = {name: given[name] * 1.0 for name in case.trained}
        outputs = results(overload(**(given | computed), **constants))
        return tuple(y if y is None else y * 1.0 for y in outputs)

    run = torch.compile(layer, fullgraph=True, **options)

    def call(inputs: Inputs) -> tuple[Any, ...]:
        given = {name: x for name, x in inputs.items() if name not in constants}
        given |= {name: given[name].clone() for name in case.mutated}
        return (*run(given), *(given[name] for name in case.mutated))

    return call


@pytest.mark.parametrize(
    ("case", "device"), params([c for c in cases() if c.tags & {COMBINATION, EXPORT}], quick=is_typical)
)
def test_one_graph_of_opaque_operators(case: Case, device: str) -> None:
    """Through AOTAutograd without a code generator, the bits stay."""
    inputs = case.inputs(device=device)
    recorder = AotEagerAndRecordGraphs()
    found = evaluate(case, inputs, compiled(case, backend=recorder))
    assert_same_bits(found, evaluate(case, inputs))
    forward, backward = ours(recorder.fw_graphs), ours(recorder.bw_graphs)
    if is_composite(case):  # a trace shows what it chose
        assert forward
        assert case.operator not in forward
    else:
        assert forward == [case.operator]
    assert bool(backward) == bool(case.trained)
    assert all(is_backward(name) for name in backward)


@pytest.mark.parametrize(("case", "device"), params(cases(tag=INDUCTOR), quick=is_typical))
def test_inductor(case: Case, device: str) -> None:
    inputs = case.inputs(torch.float32, device)
    found, expected = evaluate(case, inputs, compiled(case)), evaluate(case, inputs)
    for name, y in expected.items():
        numerics.close(found[name], y, torch.float32)


def resized(case: Case, i: int) -> Case:
    """The case at other dynamic sizes; none of them is 0 or 1, which PyTorch specialises."""
    if "offsets" in case.sizes:
        return case.resized(offsets=((0, 5, 34), (0, 3, 3, 20, 41), (0, 64, 65, 70, 71, 90))[i])
    sizes = {"B": (2, 3, 5), "T": (20, 37, 66), "N": (2, 4, 6), "P": (9, 11, 13)}
    return case.resized(**{letter: sizes[letter][i] for letter in sizes if letter in case.sizes})


@pytest.mark.parametrize(
    ("case", "device"), params(c for c in cases() if EXPORT in c.tags or (INDUCTOR in c.tags and "offsets" in c.sizes))
)
def test_one_compilation_serves_every_length(case: Case, device: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(case, backend=counter, dynamic=True)
    for i in range(3):
        other = resized(case, i)
        inputs = other.inputs(device=device)
        with torch._dynamo.config.patch(error_on_recompile=i > 0), symbolic_shapes.patch(use_duck_shape=False):
            found, expected = evaluate(other, inputs, run), evaluate(other, inputs)
        if "mode" in {argument.name for argument in case.overload._schema.arguments}:
            assert_close(found, expected)  # a dispatcher may take another form for a length that it knows
        else:
            assert_same_bits(found, expected)
    assert counter.frame_count > 0


@pytest.mark.parametrize("case", [c for c in cases(tag=EXPORT) if "T" in c.sizes], ids=str)
def test_one_compilation_serves_one_step_too(case: Case) -> None:
    """A length about which nothing is known, as in serving: no branch on it, not even on 0 and 1."""
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(case, backend=counter)
    for time in (37, 1, 50):
        other = case.resized(T=time)
        inputs = other.inputs()
        for name, x in inputs.items():
            if isinstance(x, Tensor):
                for axis in case.axis(name, "T"):
                    torch._dynamo.decorators.mark_unbacked(x, axis)
        with torch.no_grad():
            found = dict(zip(case.outputs, run(inputs), strict=True))
        for name, y in evaluate(other, inputs, wanted=()).items():
            numerics.close(found[name], y)
    assert counter.frame_count == 1


@pytest.mark.parametrize("operator", operators(), ids=lambda op: op.name)
def test_public_function_compiles(operator: fla_ops.Operator) -> None:
    """The public function adds nothing that breaks a graph: called twice in a model, with and without a gradient."""
    (case,) = cases(operator.name, EXPORT)
    function = getattr(fla_ops, operator.name)
    prepare = case.public
    counter = CompileCounterWithBackend("aot_eager")

    def model(inputs: Inputs) -> Any:
        return tuple(function(**prepare(inputs)) for _ in range(2))

    run = torch.compile(model, fullgraph=True, backend=counter)
    run(case.inputs())
    if case.trained:
        outputs = run(requiring(case.inputs(), case.trained))
        sum(y.sum() for y in tensors(outputs)).backward()
    assert counter.frame_count == 1 + bool(case.trained)
