"""What every operator must pass, written once over the registry: the tests of this folder run over `tests.cases`.

    test_coverage.py  names the cases, gradients and refusals that an operator still lacks
    test_numbers.py   forward and every gradient against the reference
    test_opcheck.py   torch.library.opcheck, and fake = real, for every combination of optional inputs
    test_compile.py   one graph, equal numbers, no recompilation
    test_export.py    dynamic batch and time, saved and loaded
    test_bits.py      every element written, equal bits twice, alone and in company
    test_vmap.py      mapped calls and their gradients
    test_pools.py     what is updated in place
    test_errors.py    refused calls, eager and compiled
    test_autograd.py  torch.func, checkpointing, autocast, what has no derivative, FLOP counts

`make test` leaves out what is marked slow: where every case costs, all but the typical ones of each operator.

This file holds what they share: running a case with gradients, and recording which operators ran.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import product
from operator import getitem
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fla_ops
from fla_ops import Operator
from tests import numerics
from tests.cases import COMBINATION, EXPORT, Case, Draw, Inputs, cases

VARYING = ("B", "T", "TK", "N", "N+1", "P")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

Named = dict[str, Tensor | None]


def operators(*kinds: str) -> list[Operator]:
    """Operators that people call with tensors, of some kinds or all; the others are parts of these."""
    public = [op for op in fla_ops.ops().values() if is_public(op.name) and "Tensor " in op.schema]
    return [op for op in public if not kinds or op.kind in kinds]


def is_public(name: str) -> bool:
    """Whether an operator is a function of the package, rather than a part of another operator, as a backward is."""
    return hasattr(fla_ops, name)


def is_composite(case: Case) -> bool:
    """Whether the case's operator only calls others."""
    return fla_ops.ops()[case.operator].kind == "composite"


def is_backward(name: str) -> bool:
    """Whether an operator only computes the gradient of another."""
    return name.endswith("_backward")


def params(
    selected: Iterable[Case], *, dtypes: Iterable[torch.dtype] | None = None, quick: Callable[..., bool] | None = None
) -> list[Any]:
    """(case, device), or (case, device, dtype), as test parameters with ids that say what they are.

    `quick`, of a case and a dtype if there is one, says which are not slow.
    """
    pairs = list(product(selected, DEVICES))
    if dtypes is None:
        values = [(case, device) for case, device in pairs]
    else:
        values = [
            (case, device, dtype)
            for (case, device), dtype in product(pairs, dtypes)
            if dtype in DTYPES[device] and dtype in case.dtypes
        ]
    slow = [quick is not None and not quick(case, *dtype) for case, _, *dtype in values]
    return [
        pytest.param(*value, id="-".join(str(x).removeprefix("torch.") for x in value), marks=[pytest.mark.slow] * mark)
        for value, mark in zip(values, slow, strict=True)
    ]


def with_slow(selected: Iterable[Case], quick: Callable[[Case], bool]) -> list[Any]:
    """The cases as test parameters, those that are not quick marked as slow."""
    return [pytest.param(case, id=str(case), marks=[pytest.mark.slow] * (not quick(case))) for case in selected]


@cache
def extremes(operator: str) -> tuple[str, str]:
    """The ids of the combinations of optional inputs that give the least and the most."""
    found = sorted(cases(operator, COMBINATION), key=lambda case: len(tensors_of(case.inputs())))
    return found[0].id, found[-1].id


def is_typical(case: Case) -> bool:
    """Whether a case stands for many: the operator's largest scenario, or the least or the most of optional inputs."""
    return EXPORT in case.tags or (COMBINATION in case.tags and case.id in extremes(case.operator))


def differentiable(tag: str | None = None) -> list[Case]:
    """Cases of operators that have a gradient, those that only compose others included."""
    return [case for case in cases(tag=tag) if case.trained]


def with_parts(tag: str, suffix: str = "") -> list[Case]:
    """Cases of operators that have parts of their own (see `parts`), such as a backward operator."""
    owners = {whole(name) for name in fla_ops.ops() if not is_public(name) and name.endswith(suffix)}
    return [case for case in cases(tag=tag) if case.operator in owners]


def requiring(inputs: Inputs, names: Iterable[str]) -> Inputs:
    """The same inputs, with a gradient wanted of those named; strides stay."""
    return {
        name: pytree.tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), value) if name in names else value
        for name, value in inputs.items()
    }


def labelled(names: Iterable[str], values: Iterable[Any]) -> Iterator[tuple[str, Tensor | None]]:
    """Each tensor with its name; the parts of a tuple are numbered."""
    for name, value in zip(names, values, strict=True):
        if isinstance(value, (tuple, list)):
            yield from labelled([f"{name}.{i}" for i in range(len(value))], value)
        else:
            yield name, value


def cotangents(outputs: Mapping[str, Tensor | None], seed: int = 0) -> Named:
    """A gradient to arrive at each floating output."""
    return {
        name: None if y is None else Draw(y.dtype, y.device, seed).normal(f"d{name}", y.shape)
        for name, y in outputs.items()
    }


def gradients(outputs: Named, inputs: Inputs, arriving: Named, names: Iterable[str]) -> Named:
    """The gradient of each named input; zeros where it does not reach the outputs."""
    wanted = dict(labelled([f"d{name}" for name in names], [inputs[name] for name in names]))
    live = {name: y for name, y in outputs.items() if y is not None and y.requires_grad}
    upstream = [arriving[name].to(y.dtype) for name, y in live.items()]
    found = torch.autograd.grad(list(live.values()), list(wanted.values()), upstream, allow_unused=True)
    return {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(wanted.items(), found, strict=True)}


def evaluate(
    case: Case,
    inputs: Inputs,
    function: Callable[[Inputs], tuple[Any, ...]] | None = None,
    arriving: Named | None = None,
    wanted: Iterable[str] | None = None,
) -> Named:
    """Outputs and gradients by name: {"o": ..., "final_state": None, "dq": ...}, of the operator or of `function`."""
    names = case.trained if wanted is None else tuple(wanted)
    inputs = requiring(inputs, names)
    outputs = dict(labelled(case.outputs, (function or case.call)(inputs)))
    if not names:
        return outputs
    return outputs | gradients(outputs, inputs, arriving or cotangents(outputs), names)


def detached(values: Named) -> Named:
    """Without the graphs behind them."""
    return {name: None if x is None else x.detach() for name, x in values.items()}


def assert_same_bits(found: Named, expected: Named) -> None:
    """Equal in every bit, NaN included; names what is not."""
    assert found.keys() == expected.keys()
    different = [name for name, x in found.items() if not same_bits(x, expected[name])]
    assert not different, f"bits differ in {', '.join(different)}"


def assert_close(found: Named, expected: Named) -> None:
    """Two computations of one thing."""
    assert found.keys() == expected.keys()
    for name, x in found.items():
        y = expected[name]
        assert (x is None) == (y is None), name
        if x is not None and y is not None:
            numerics.close(x, y)


def same_bits(x: Tensor | None, y: Tensor | None) -> bool:
    """Whether two tensors, or two Nones, are the same."""
    if x is None or y is None:
        return x is y
    return x.dtype == y.dtype and torch.equal(x.nan_to_num(nan=7e4), y.nan_to_num(nan=7e4)) and x.shape == y.shape


class Call(NamedTuple):
    """One operator call that a Recorder saw."""

    overload: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any

    @property
    def name(self) -> str:
        """The operator's name under torch.ops.fla."""
        return self.overload._opname


class Recorder(TorchDispatchMode):
    """Records every call of an operator of ours, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []  # their arguments detached

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and note it."""
        outputs = function(*args, **(kwargs or {}))
        if function.namespace == "fla":
            self.calls.append(
                Call(function, *pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, outputs)))
            )
        return outputs


def parts(case: Case, inputs: Inputs, wanted: Iterable[str] | None = None) -> list[Call]:
    """The calls that a case and its gradient make of operators which people do not call, such as its backward.

    Where one operator calls another that has cases of its own, the parts of that other are left to them.
    """
    with Recorder() as recorder:
        evaluate(case, inputs, wanted=wanted)
    return [call for call in recorder.calls if not is_public(call.name) and whole(call.name) in (None, case.operator)]


def whole(name: str) -> str | None:
    """The public operator that one is a part of, by its name."""
    name = name.removesuffix("_backward").removesuffix("_forward")
    return name if is_public(name) else None


class Layer(torch.nn.Module):
    """A module that calls one operator; what is not a tensor is part of it."""

    def __init__(self, case: Case, constants: Inputs) -> None:
        super().__init__()
        self.overload, self.constants = case.overload, constants

    def forward(self, x: dict[str, Tensor]) -> Any:
        """Call the operator."""
        return self.overload(**x, **self.constants)


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that a program takes."""
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor)}


def export(case: Case) -> ExportedProgram:
    """The case's call with its batch, time, sequences and pool rows dynamic."""
    inputs = case.inputs()
    given = tensors_of(inputs)
    dynamic = {name: {i: Dim.AUTO for letter in VARYING for i in case.axis(name, letter)} for name in given}
    constants = {name: x for name, x in inputs.items() if name not in given}
    return torch.export.export(Layer(case, constants), (given,), dynamic_shapes=(dynamic,))


def listing(program: ExportedProgram) -> str:
    """The graph of a program, a line for each node."""
    lines = []
    for node in program.graph.nodes:
        arguments = ", ".join(map(str, node.args))
        target = "getitem" if node.target is getitem else str(node.target)
        call = f" = {target.removesuffix('.default')}({arguments})"
        lines.append(node.name + call * (node.op != "placeholder"))
    return "\n".join(lines)


def ours(graphs: list[GraphModule]) -> list[str]:
    """Names of our operators in recorded graphs, in order; those updated in place are arguments of a wrapper."""
    found = []
    for graph in graphs:
        for node in graph.graph.nodes:
            if node.op == "call_function":
                targets = [x for x in (node.target, *node.args) if isinstance(x, OpOverload)]
                found += [t._opname for t in targets if t.namespace == "fla"]
    return found
