"""Named calls of the operators, shared by the tests, the interpreter's tests and the benchmarks.

A case is one call of one registered operator: inputs to build, the reference that says what must come out, and what
each axis of a tensor means. The contract tests run over all cases, so a family only adds its own:

1. Write `tests/<family>/cases.py`: how to build inputs, a reference for each operator, `register(Case(...), ...)`.
2. Write `tests/<family>/refusals.py`: the calls that must fail for a reason of their own (see `tests/refusals.py`).

Using them:

    for case in cases("chunk_simple_gla"):                   # or cases(tag=COMBINATION), or cases()
        inputs = case.inputs(torch.bfloat16, "cpu", seed=1)  # by the operator's names: {"q": ..., "scale": 0.3}
        outputs = case.call(inputs)                          # (o, final_state): a tuple; None for what is not returned
        truth = case.reference(**widened(inputs))            # the same tuple, in float64
        longer = case.resized(T=1000).inputs()               # the same call at other sizes

Arguments are those of the operator's schema; a value may be a tuple of tensors where the schema takes a list. The
reference of an operator that updates an argument in place returns the outputs and then the updated arguments. So does
`case.call`, which works on a copy.

The values of a tensor depend on its name, shape and seed, not on the dtype, the device or what else the case gives.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations as subsets
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fla_ops
from fla_ops.signature import Signature
from fla_ops.validation import letters_of

FAMILIES = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/cases.py")))

COMBINATION = "combination"  # tiny; one for each legal combination of optional inputs
INDUCTOR = "inductor"  # also compiled with Inductor, which takes seconds: a few for each operator
EXPORT = "export"  # exported with dynamic batch and time
SMALL = "small"  # cheap enough for Triton's interpreter

Inputs = dict[str, Any]


class Draw:
    """Random tensors by name: drawn in float64 on the host, then rounded to the dtype and moved to the device."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device, seed: int) -> None:
        self.dtype, self.device, self.seed = dtype, torch.device(device), seed
        halved = dtype in (torch.bfloat16, torch.float16)
        self.wide = (
            torch.float32 if halved else dtype
        )  # what gates and states usually have beside half-precision activations

    def normal(self, name: str, shape: Sequence[int], std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Activations and states."""
        return (std * torch.randn(*shape, dtype=torch.float64, generator=self._generator(name))).to(
            device=self.device, dtype=dtype or self.dtype
        )

    def decay(
        self, name: str, shape: Sequence[int], low: float = -1.0, high: float = 0.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Log decays between low and high, in the wide dtype unless told."""
        uniform = torch.rand(*shape, dtype=torch.float64, generator=self._generator(name))
        return (low + (high - low) * uniform).to(device=self.device, dtype=dtype or self.wide)

    def integers(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        """Offsets or slots."""
        return torch.tensor(list(values), dtype=dtype, device=self.device)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(name.encode()) + 7919 * self.seed)


@dataclass(frozen=True)
class Case:
    """One call of one operator.

    id              the reason why the case is there
    operator        name under torch.ops.fla, and in fla_ops.ops()
    build           (draw, sizes) -> the arguments that are given, by the schema's names
    sizes           the size of each axis letter, and "offsets" for packed sequences; all different where possible
    reference       (**arguments) -> the outputs, differentiable by autograd, in float64 when given float64
    outputs         names of what the reference returns
    differentiable  arguments that have a gradient
    tags            COMBINATION, INDUCTOR, EXPORT, SMALL
    dtypes          activation dtypes in which the case runs
    public          the public function's arguments from the operator's, where they differ (a pair for two states)
    axes            the axis letters of every tensor, as "B T HK K", where they are not those that the operator's call
                    declares
    """

    id: str
    operator: str
    build: Callable[[Draw, Mapping[str, Any]], Inputs]
    sizes: Mapping[str, Any]
    reference: Callable[..., tuple[Any, ...]]
    outputs: tuple[str, ...]
    differentiable: tuple[str, ...] = ()
    tags: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    public: Callable[[Inputs], Inputs] = dict
    axes: Mapping[str, str] = field(default_factory=dict)
    given: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Find out which arguments the case gives, and what their axes are."""
        inputs = self.inputs()
        object.__setattr__(self, "given", frozenset(name for name, value in inputs.items() if value is not None))
        if not self.axes:
            object.__setattr__(self, "axes", self.declaration.call(**inputs).axes)

    def __str__(self) -> str:
        return f"{self.operator}-{self.id}"

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The operator."""
        return fla_ops.ops()[self.operator].overload

    @property
    def declaration(self) -> Signature:
        """The operator's arguments."""
        return fla_ops.ops()[self.operator].declaration

    @property
    def mutated(self) -> tuple[str, ...]:
        """Arguments that the operator updates in place."""
        return self.declaration.mutated

    @property
    def trained(self) -> tuple[str, ...]:
        """Arguments that are given and have a gradient."""
        return tuple(name for name in self.differentiable if name in self.given)

    def inputs(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0) -> Inputs:
        """The arguments by name, with activations in `dtype`."""
        return self.build(Draw(dtype, device, seed), self.sizes)

    def resized(self, **sizes: Any) -> Case:
        """The same call at other sizes."""
        return replace(self, sizes={**self.sizes, **sizes})

    def call(self, inputs: Inputs) -> tuple[Any, ...]:
        """The operator's outputs as a tuple, followed by the arguments it updated; `inputs` stay as they are."""
        inputs = {name: value.clone() if name in self.mutated else value for name, value in inputs.items()}
        outputs = results(self.overload(**inputs))
        return (*outputs, *(inputs[name] for name in self.mutated))

    def axis(self, name: str, letter: str) -> list[int]:
        """The dimensions of a tensor that a letter names."""
        return [i for i, found in enumerate(letters_of(self.axes.get(name, ""))) if found == letter]


_REGISTERED: list[Case] = []


def register(*new: Case) -> None:
    """Add cases; ids must differ within an operator."""
    taken = {str(case) for case in _REGISTERED}
    for case in new:
        if str(case) in taken:
            raise ValueError(f"there is a case {case} already")
        taken.add(str(case))
        _REGISTERED.append(case)


@cache
def _all() -> tuple[Case, ...]:
    for family in FAMILIES:
        importlib.import_module(f"tests.{family}.cases")
    return tuple(_REGISTERED)


def cases(operator: str | None = None, tag: str | None = None) -> list[Case]:
    """Every case, or those of an operator, or those with a tag."""
    return [c for c in _all() if operator in (None, c.operator) and (tag is None or tag in c.tags)]


def widened(inputs: Inputs) -> Inputs:
    """The same values in float64."""
    return pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in an argument or in several, in order."""
    return [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]


def subsets_of(
    optional: Sequence[str], exclusive: Sequence[tuple[str, str]] = (), needs: Mapping[str, str] | None = None
) -> Iterator[tuple[str, ...]]:
    """Every set of optional arguments that may be given together: not both of a pair, nothing without what it needs."""
    for count in range(len(optional) + 1):
        for given in subsets(optional, count):
            both = any(a in given and b in given for a, b in exclusive)
            lacking = any(a in given and b not in given for a, b in (needs or {}).items())
            if not (both or lacking):
                yield given


def results(outputs: Any) -> tuple[Any, ...]:
    """What an operator returns, as a tuple: one tensor, several, or nothing."""
    if outputs is None:
        return ()
    return outputs if isinstance(outputs, tuple) else (outputs,)


def strided(x: Tensor) -> Tensor:
    """The same values, not contiguous in any dimension."""
    spaced = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan") if x.is_floating_point() else -7)
    spaced = spaced.mT.contiguous().mT if x.dim() > 1 else spaced
    view = spaced[..., 1 : 2 * x.shape[-1] + 1 : 2]
    return view.copy_(x)
