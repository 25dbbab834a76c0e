"""How far the operators are from their references on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fla_ops

from .problems import Problem

FLOOR = 2.0**-16  # in float32: 256 roundings


@dataclass(frozen=True)
class Result:
    """The worst of an operator's outputs and gradients, in float32.

    error    norm of the difference from the reference in float64, relative to that; None where the call failed
    allowed  twice the error of the reference in float32, plus FLOOR
    failure  what the call raised
    """

    operator: str
    right: bool
    error: float | None = None
    allowed: float | None = None
    failure: str | None = None

    def __str__(self) -> str:
        said = self.failure or f"error {self.error:.1e}, allowed {self.allowed:.1e}"
        return f"{self.operator:30s} {'ok   ' if self.right else 'WRONG'} {said}"


def compare(problem: Problem, device: str) -> Result:
    """The public function on a device, against the reference on the host."""
    truths = _computed(problem, problem.reference, torch.float64, "cpu")
    references = _computed(problem, problem.reference, torch.float32, "cpu")

    def function(**inputs: Any) -> Any:
        outputs = getattr(fla_ops, problem.function)(**inputs, **problem.flags)
        return outputs, [inputs[name] for name in problem.updated]

    try:
        found = _computed(problem, function, torch.float32, device)
    except Exception as raised:  # noqa: BLE001  (whatever is broken here, the other operators are still checked)
        return Result(problem.function, right=False, failure=f"{type(raised).__name__}: {raised}")
    if [x.shape for x in found] != [x.shape for x in truths]:
        shapes = f"shapes {[tuple(x.shape) for x in found]}, not {[tuple(x.shape) for x in truths]}"
        return Result(problem.function, right=False, failure=shapes)
    if not all(x.isfinite().all() for x in found):
        return Result(problem.function, right=False, failure="a result or a gradient is not finite")
    pairs = [
        (_error(x, truth), 2 * _error(reference, truth) + FLOOR)
        for x, reference, truth in zip(found, references, truths, strict=True)
    ]
    error, allowed = max(pairs, key=lambda pair: pair[0] / pair[1])
    return Result(problem.function, error <= allowed, error, allowed)


def _computed(problem: Problem, function: Callable[..., Any], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Outputs, and the gradients of a weighted sum of them, in float64 on the host."""

    def given(x: Tensor) -> Tensor:
        x = x.to(device, dtype if x.is_floating_point() else x.dtype, copy=True)
        return x.requires_grad_(problem.trained and x.is_floating_point())

    inputs = pytree.tree_map_only(Tensor, given, problem.inputs)
    results = [x for x in pytree.tree_leaves(function(**inputs)) if isinstance(x, Tensor)]
    if problem.trained:
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view_as(x) for x in results]
        trained = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
        results += torch.autograd.grad(results, trained, weights)
    return [x.detach().to("cpu", torch.float64) for x in results]


def _error(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).norm() / truth.norm())
