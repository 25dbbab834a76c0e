"""Choosing a form: which forms can serve a call, which is the fastest, and why the others are not taken.

A choice looks only at what is statically known. A symbolic size never adds a guard: the general form serves it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fla_ops.signature import Signature

Reasons = Callable[[Any], list[str]]  # of a call
PublicFunction = TypeVar("PublicFunction", bound=Callable[..., Any])

DISPATCHERS: dict[Callable[..., Any], tuple[Family, Callable[..., Any]]] = {}


def nothing(c: Any) -> list[str]:
    """No reason against a form, and nothing to note about it."""
    return []


def refuse_reverse(c: Any) -> list[str]:
    """Of forms that only run along time."""
    return ["reverse=True runs time backwards, which only fused_recurrent does"] * c.reverse


@dataclass(frozen=True)
class Form:
    """One way to compute a call.

    refuse  why it cannot serve the call
    note    where it runs another form's kernels
    """

    name: str
    signature: Signature
    refuse: Reasons = nothing
    note: Reasons = nothing


@dataclass(frozen=True)
class Choice:
    """The form that was chosen, and the reasons of those that refused."""

    form: Form
    preferred: tuple[str, ...]
    refused: dict[str, list[str]]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"torch.ops.fla.{self.form.signature.name} ({self.form.name})",
            f"  order of preference: {', '.join(self.preferred)}",
        ]
        lines += [f"  {name} refuses: {'; '.join(reasons)}" for name, reasons in self.refused.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Family:
    """A dispatcher: its signature, its forms, what its calls must be, and the order of preference for a call."""

    signature: Signature
    forms: tuple[Form, ...]
    check: Callable[[Any], Any]
    order: Callable[[Any], tuple[str, ...]]

    def choose(self, c: Any) -> Choice:
        """The form that the call names, or the first in the order of preference that does not refuse.

        A named form that refuses is an error.
        """
        for name in ("q", "k", "v", "cu_seqlens"):  # the rest is for the form's operator to check
            x, wanted = getattr(c, name), c.axes[name].split()
            if x is not None and x.dim() != len(wanted):
                pattern = ", ".join(wanted).replace("+", " + ")
                raise ValueError(f"{name} must be [{pattern}], got ({', '.join(map(str, x.shape))})")
        by_name = {form.name: form for form in self.forms}
        if c.mode not in ("auto", *by_name):
            raise ValueError(f"mode must be auto, {', '.join(by_name)}, got {c.mode!r}")
        refused = {form.name: reasons for form in self.forms if (reasons := form.refuse(c))}
        family = self.signature.name
        if c.mode in refused:
            raise NotImplementedError(f"{family} with mode={c.mode!r}: {'; '.join(refused[c.mode])}")
        order = self._preferred(c) if c.mode == "auto" else (c.mode,)
        served = [by_name[name] for name in order if name not in refused]
        if not served:
            everything = "; ".join(f"{name}: {', '.join(why)}" for name, why in refused.items())
            raise NotImplementedError(f"no form of {family} serves this call: {everything}")
        return Choice(served[0], order, refused)

    def _preferred(self, c: Any) -> tuple[str, ...]:
        """The order for what this rank has of the call; along a sharded time, forms with a state come first."""
        order = self.order(_on_this_rank(c))
        if not is_shared_in_time(c.v):
            return order
        by_name = {form.name: form for form in self.forms}
        return tuple(sorted(order, key=lambda name: "output_final_state" not in by_name[name].signature.fields))

    def dispatch(self, c: Any) -> Any:
        """The body of the dispatcher's operator: a call of the chosen form's operator."""
        signature = self.choose(c).form.signature
        return getattr(torch.ops.fla, signature.name)(*signature.arguments_of(c))


def dispatcher(
    family: Family, arguments: Callable[..., dict[str, Any]] = dict
) -> Callable[[PublicFunction], PublicFunction]:
    """Say that a public function calls this family's dispatcher, for `explain`.

    `arguments` makes the operator's arguments from the function's, where they differ.
    """

    def remember(function: PublicFunction) -> PublicFunction:
        DISPATCHERS[function] = (family, arguments)
        return function

    return remember


def known(condition: Any) -> bool:
    """Whether a condition on sizes certainly holds, without a guard on a symbolic size."""
    return bool(statically_known_true(condition))


def is_shared_in_time(x: Tensor) -> bool:
    """Whether x [B, T, ...] is a DTensor of which each rank holds other steps."""
    return any(placement.is_shard(1) for placement in getattr(x, "placements", ()))


def _on_this_rank(c: Any) -> Any:
    """The call with the tensors that this rank has, where it has DTensors: what is fast depends on its share."""
    local = {name: x.to_local() for name, x in zip(c._fields, c, strict=True) if hasattr(x, "to_local")}
    return c._replace(**local) if local else c


def wants_gradient(c: Any) -> bool:
    """Whether autograd would record this call."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in c)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """What a dispatcher would choose for this call, and why not the others. The call is checked, nothing is computed.

    Args:
        function: a dispatcher of this package, such as `fla_ops.simple_gla`.
        args, kwargs: the arguments of the call.

    Returns:
        The choice; printed, it lists the operator, the order of preference, each refusal, and where the form runs
        another form's kernels.

    Raises:
        TypeError: if `function` is not a dispatcher; and what the call itself would raise.
    """
    if function not in DISPATCHERS:
        raise TypeError(f"explain wants a dispatcher such as fla_ops.simple_gla, got {function!r}")
    family, arguments = DISPATCHERS[function]
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    defaults = family.signature.call._field_defaults
    given = {name: defaults.get(name) if x is None else x for name, x in arguments(**bound.arguments).items()}
    c = family.signature.call(**given)
    choice = family.choose(c)
    family.check(c)
    return Choice(choice.form, choice.preferred, choice.refused, tuple(choice.form.note(c)))
