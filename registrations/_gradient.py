"""The Autograd kernel of an operator: its gradient formula, or an explicit refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import _C, Tensor
from torch._functorch import autograd_function
from torch._ops import OpOverload

from fla_ops.signature import Gradient

Kernels = Mapping[Any, Callable[..., Any]]  # what runs for each backend's dispatch key
Below = Callable[[Any, tuple[Any, ...]], Any]


def kernel(
    op: OpOverload, gradient: Gradient | None, kernels: Kernels, mutated: Sequence[int] = ()
) -> Callable[..., Any]:
    """The function to register under the Autograd key (with the keyset as its first argument)."""
    below = _below_autograd(op, kernels, mutated)
    return _refusing(op, below) if gradient is None else _differentiable(op, below, *_formula(gradient))


def version_kernel(op: OpOverload, mutated: Sequence[int]) -> Callable[..., Any]:
    """The function to register under ADInplaceOrView, for an operator that updates some arguments in place."""

    def run(keyset: Any, *args: Any) -> Any:
        _count_updates(op, mutated, args)
        return op.redispatch(keyset & _C._after_ADInplaceOrView_keyset, *args)

    return run


def _count_updates(op: OpOverload, mutated: Sequence[int], args: Sequence[Any]) -> None:
    """A gradient that saved an updated argument before must not read the new values without a word: the version counter
    says so.
    """
    for i in mutated:
        if args[i].is_inference():
            name = op._schema.arguments[i].name
            raise RuntimeError(
                f"{op._schema.name} updates {name} in place, which is an inference tensor: outside InferenceMode, "
                f"give it a clone"
            )
        torch.autograd.graph.increment_version(args[i])


def _formula(gradient: Gradient) -> tuple[Callable[..., None], Callable[..., Any]]:
    """What an operator's gradient saves, and how it is computed from that: by one call of the backward operator."""
    fields, outputs = gradient.of.fields, gradient.of.outputs._fields
    saved = [(0, fields.index(x)) if x in fields else (1, outputs.index(x)) for x in gradient.saved]
    settings = [fields.index(name) for name in gradient.settings]
    kept = [outputs.index(name) for name in gradient.kept]
    received = [outputs.index(name) for name in gradient.received]
    wanted = [fields.index(name) for name in gradient.need._fields]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        output = (output,) if isinstance(output, Tensor) else output
        ctx.mark_non_differentiable(*(output[i] for i in kept if output[i] is not None))
        ctx.save_for_backward(*((inputs, output)[which][i] for which, i in saved))
        ctx.settings = [inputs[i] for i in settings]
        ctx.first = output[0].shape, output[0].dtype
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        results: list[Tensor | None] = [None] * len(fields)
        first, *others = (grads[i] for i in received)
        if all(d is None for d in (first, *others)):
            return tuple(results)
        tensors = ctx.saved_tensors
        if first is None:  # only a final state was used
            shape, dtype = ctx.first
            first = tensors[0].new_zeros(shape, dtype=dtype)
        mask = [ctx.needs_input_grad[i] for i in wanted]
        operator = getattr(torch.ops.fla, gradient.name)
        for i, d in zip(wanted, operator(*tensors, first, *others, *ctx.settings, mask), strict=True):
            results[i] = d
        return tuple(results)

    return setup_context, backward


def _below_autograd(op: OpOverload, kernels: Kernels, mutated: Sequence[int]) -> Below:
    """What takes over from autograd. Where a backend comes next its kernel is called at once: two turns through the
    dispatcher take longer than all else that a small call needs.
    """

    def below(keyset: Any, args: tuple[Any, ...]) -> Any:
        kernel = kernels.get((keyset & _C._after_ADInplaceOrView_keyset).highestPriorityTypeId())
        with _C._AutoDispatchBelowAutograd():
            if kernel is None:
                return op.redispatch(keyset & _C._after_autograd_keyset, *args)
            _count_updates(op, mutated, args)
            return kernel(*args)

    return below


def _refuse_forward_mode(op: OpOverload) -> None:
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{op._schema.name} has no forward-mode derivative: use reverse mode (backward, grad, vjp)"
        )


def _refusing(op: OpOverload, below: Below) -> Callable[..., Any]:
    name = op._schema.name

    def run(keyset: Any, *args: Any) -> Any:
        _refuse_forward_mode(op)
        if torch.is_grad_enabled() and _C._any_requires_grad(*args):
            raise NotImplementedError(
                f"{name} is for inference and has no gradient: call it under torch.no_grad() or detach its inputs"
            )
        return below(keyset, args)

    return run


def refusing_later(op: OpOverload, kernels: Kernels) -> Callable[..., Any]:
    """For a backward operator: `torch.func.grad` records it always, so only differentiating its outputs is an error."""
    name = op._schema.name
    reason = (
        f"{name} has no gradient of its own: double backward through {name.removesuffix('_backward')} is not supported"
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(reason)

    return _differentiable(op, _below_autograd(op, kernels, ()), setup_context, backward)


def _differentiable(
    op: OpOverload, below: Below, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    defaults = [a.default_value for a in op._schema.arguments]
    label = "Backward_" + op._schema.name.replace("::", "_")

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            output = below(keyset, args)
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
        return below(keyset, args)

    return run
