"""A function against its definition: outputs and every gradient, in float32 and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.numerics import check


def against_reference(inputs: dict[str, Any], ours: Callable[..., Any], truth: Callable[..., Any]) -> None:
    """Outputs and the gradients of all that has one: float32 against float64, as its rule wants."""
    names = [key for key, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    found = []
    for function, dtype in (
        (ours, torch.float32),
        (truth, torch.float32),
        (truth, torch.float64),
        (ours, torch.float64),
    ):
        leaves = {key: inputs[key].to(dtype, copy=True).requires_grad_() for key in names}
        outputs = function(**{**inputs, **leaves})
        torch.manual_seed(1)
        weights = [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
        results = {f"o{i}": o.detach() for i, o in enumerate(outputs)}
        found.append(results | {f"d{key}": grad for key, grad in zip(leaves, grads, strict=True)})
    single, reference_single, exact, double = found
    check(single, reference_single, exact, torch.float32)
    check(double, exact, exact, torch.float64)
