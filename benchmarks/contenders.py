"""Our side of a comparison: an operator eager, compiled, and compiled with its body inlined."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fla_ops

from .problems import TRAINING, Inputs, Problem
from .timing import Contender

EAGER, COMPILED, INLINED = "eager", "compiled", "inlined"
ROTATED = 256 << 20  # bytes of inputs that calls rotate through at most
MOST_SETS = 32


def input_sets(
    problem: Problem, what: str, device: torch.device, cache: int, dtype: torch.dtype | None = None
) -> list[Inputs]:
    """Sets of inputs to rotate through, larger together than the cache as far as that is sensible."""
    first = problem.inputs(device, 0, dtype)
    size = sum(x.nbytes for x in first.values() if isinstance(x, Tensor))
    wanted = min(cache * 2, ROTATED) // max(size, 1) + 1
    sets = [first, *(problem.inputs(device, seed, dtype) for seed in range(1, min(max(wanted, 2), MOST_SETS)))]
    if what == TRAINING:
        for inputs in sets:
            for name in problem.trained:
                if name in inputs:
                    inputs[name].requires_grad_()
    return sets


def first_tensor(output: Any) -> Tensor:
    """The output o."""
    return output[0] if isinstance(output, tuple) else output


def contender(name: str, call: Callable[[int], Any], leaves: list[list[Tensor]], what: str) -> Contender:
    """Time `call(i)`, with the gradients of `leaves[i]` when training."""
    if what != TRAINING:

        def forward(i: int) -> Any:
            with torch.no_grad():
                return call(i)

        return Contender(name, forward, len(leaves))
    upstream: list[Tensor] = []

    def training(i: int) -> Any:
        o = first_tensor(call(i))
        if not upstream:
            upstream.append(torch.randn_like(o))
        return torch.autograd.grad(o, leaves[i], upstream[0])

    return Contender(name, training, len(leaves))


def ours(problem: Problem, what: str, how: str, sets: list[Inputs], name: str | None = None) -> Contender:
    """The operator's public function on each set of inputs."""
    function = getattr(fla_ops, problem.operator)
    if how != EAGER:
        function = compiled(function)

    def call(i: int) -> Any:
        return function(**sets[i])

    leaves = [[inputs[name] for name in problem.trained if name in inputs] for inputs in sets]
    made = contender(name or how, call, leaves, what)
    if how == INLINED:  # both graphs are compiled by the first call
        with fla_ops.inlining():
            made.call(0)
    return made


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile in one graph, of a fresh code object: compiled code is kept by code object, however it was made."""

    def call(**inputs: Any) -> Any:
        return first_tensor(function(**inputs))

    fresh = types.FunctionType(
        call.__code__.replace(), call.__globals__, call.__name__, call.__defaults__, call.__closure__
    )
    return torch.compile(fresh, fullgraph=True)


class _Called(TorchDispatchMode):
    """The names of our operators that a call ends up in."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fla":
            self.names.add(function._schema.name.removeprefix("fla::"))
        return function(*args, **(kwargs or {}))


def inlines(problem: Problem, inputs: Inputs, device: torch.device) -> bool:
    """Whether compiled code can hold the body of an operator that this call ends up in."""
    with FakeTensorMode() as fake, torch.no_grad():
        given = {name: fake.from_tensor(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        with _Called() as called:
            getattr(fla_ops, problem.operator)(**given)
    operators = fla_ops.ops()
    return any(device.type in operators[name].inlines_on for name in called.names)


@contextlib.contextmanager
def fresh_compiler():
    """Nothing compiled before, nothing kept after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
