"""Choosing a form: what a call looks like, which forms can serve it, and why the others cannot.

A choice looks only at what is statically known. A symbolic size never adds a guard: the general form serves it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

Refusal = Callable[["Request"], list[str]]


@dataclass(frozen=True)
class Request:
    """What one call asks for. Sizes may be symbolic."""

    family: str
    device: str
    batch: Any
    time: Any
    heads: Any
    key_width: Any
    value_width: Any
    dtype: torch.dtype = torch.float32
    gradient: bool = False
    packed: bool = False
    state: bool = False
    reverse: bool = False
    key_heads: Any = None  # where values have more heads

    def known(self, condition: Any) -> bool:
        """Whether a condition on sizes certainly holds, without a guard on a symbolic size."""
        return bool(statically_known_true(condition))


@dataclass(frozen=True)
class Form:
    """One way to compute an operator, and its refusals as data."""

    name: str
    operator: str
    refuse: Refusal = field(default=lambda request: [])


@dataclass(frozen=True)
class Choice:
    """The form that was chosen, and the reasons of those that refused."""

    form: Form
    preferred: tuple[str, ...]
    refused: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [
            f"torch.ops.fla.{self.form.operator} ({self.form.name})",
            f"  order of preference: {', '.join(self.preferred)}",
        ]
        lines += [f"  {name} refuses: {'; '.join(reasons)}" for name, reasons in self.refused.items()]
        return "\n".join(lines)


def select(forms: Sequence[Form], request: Request, mode: str, order: Sequence[str]) -> Choice:
    """The named form, or the first of `order` that does not refuse. A named form that refuses is an error."""
    by_name = {form.name: form for form in forms}
    refused = {form.name: reasons for form in forms if (reasons := form.refuse(request))}
    if mode == "auto":
        for name in order:
            if name not in refused:
                return Choice(by_name[name], tuple(order), refused)
        everything = "; ".join(f"{name}: {', '.join(why)}" for name, why in refused.items())
        raise NotImplementedError(f"no form of {request.family} serves this call: {everything}")
    if mode not in by_name:
        raise ValueError(f"mode must be auto, {', '.join(by_name)}, got {mode!r}")
    if mode in refused:
        raise NotImplementedError(f"{request.family} with mode={mode!r}: {'; '.join(refused[mode])}")
    return Choice(by_name[mode], (mode,), refused)


def wants_gradient(*inputs: Tensor | None) -> bool:
    """Whether autograd would record this call."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """What a dispatcher would choose for this call, and why not the others. Nothing is computed.

    Args:
        function: a dispatcher of this package, such as `fla_ops.simple_gla`.
        args, kwargs: the arguments of the call.

    Returns:
        The choice; printed, it lists the operator, the order of preference and each refusal.

    Raises:
        TypeError: if `function` is not a dispatcher.
    """
    family = getattr(function, "__name__", "")
    if function is not getattr(importlib.import_module("fla_ops"), family, None) or not hasattr(function, "choose"):
        raise TypeError(f"explain wants a dispatcher such as fla_ops.simple_gla, got {function!r}")
    choice: Choice = function.choose(*args, **kwargs)
    return choice
