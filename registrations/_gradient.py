"""The Autograd kernel of an operator: its gradient formula, or an explicit refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import _C
from torch._functorch import autograd_function
from torch._ops import OpOverload


def kernel(
    op: OpOverload, setup_context: Callable[..., None] | None, backward: Callable[..., Any] | None
) -> Callable[..., Any]:
    """The function to register under the Autograd key (with the keyset as its first argument)."""
    if backward is None:
        return _refusing(op)
    if setup_context is None:
        raise TypeError(f"{op._schema.name}: a backward formula needs a setup_context")
    return _differentiable(op, setup_context, backward)


def _below_autograd(op: OpOverload, keyset: Any, args: tuple[Any, ...]) -> Any:
    with _C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _C._after_autograd_keyset, *args)


def _refuse_forward_mode(op: OpOverload) -> None:
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{op._schema.name} has no forward-mode derivative: use reverse mode (backward, grad, vjp)"
        )


def _refusing(op: OpOverload) -> Callable[..., Any]:
    name = op._schema.name
    if name.endswith("_backward"):
        return _refusing_later(op)

    def run(keyset: Any, *args: Any) -> Any:
        _refuse_forward_mode(op)
        if torch.is_grad_enabled() and _C._any_requires_grad(*args):
            raise NotImplementedError(
                f"{name} is for inference and has no gradient: call it under torch.no_grad() or detach its inputs"
            )
        return _below_autograd(op, keyset, args)

    return run


def _refusing_later(op: OpOverload) -> Callable[..., Any]:
    """For a backward operator: `torch.func.grad` records it always, so only differentiating its outputs is an error."""
    name = op._schema.name
    reason = (
        f"{name} has no gradient of its own: double backward through {name.removesuffix('_backward')} is not supported"
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(reason)

    return _differentiable(op, setup_context, backward)


def _differentiable(
    op: OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    defaults = [a.default_value for a in op._schema.arguments]
    label = "Backward_" + op._schema.name.replace("::", "_")

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            output = _below_autograd(op, keyset, args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            needs = ctx.needs_input_grad
            ctx.needs_input_grad = needs[1:]  # without the keyset
            try:
                return (None, *backward(ctx, *grads))
            finally:
                ctx.needs_input_grad = needs

    class Transformed(Direct):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            with torch.enable_grad():  # for the levels below this one
                return Direct.forward(ctx, keyset, *args)

    Direct.__name__ = Transformed.__name__ = label

    def run(keyset: Any, *args: Any) -> Any:
        _refuse_forward_mode(op)
        if torch.is_grad_enabled() and _C._any_requires_grad(*args):
            args = (*args, *defaults[len(args) :])  # the dispatcher drops trailing defaults
            if not _C._are_functorch_transforms_active():
                return Direct.apply(keyset, *args)  # type: ignore[no-untyped-call]
            # A transform has dispatched its own level to this kernel: the next one takes over below autograd.
            with autograd_function.enable_single_level_autograd_function():  # type: ignore[attr-defined]
                return super(torch.autograd.Function, Transformed).apply(keyset, *args)  # type: ignore[no-untyped-call]
        return _below_autograd(op, keyset, args)

    return run
