"""The one call that wires an operator into PyTorch: schema, kernels, fake, gradient, autocast, FLOP formula,
inlining.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import _autocast, _flops, _gradient, _inline

NAMESPACE = "fla"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

# Triton's own switch: with it set, a kernel runs on host tensors, so the CPU key takes the Triton launchers.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Operator:
    """What is registered under one name: the contract tests and `fla_ops.ops()` read this record."""

    name: str
    kind: Literal["differentiable", "inference", "composite"]
    schema: str
    overload: OpOverload
    cpu: str | None = None
    cuda: str | None = None
    inlines_on: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind:14s} {self.schema}"


OPERATORS: dict[str, Operator] = {}


@cache
def resolve(path: str) -> Callable[..., Any]:
    """The function that "package.module:function" names, imported on first use."""
    module, function = path.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _complete(op: OpOverload, function: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """Call `function()` with every argument of the schema: the dispatcher drops trailing ones that equal their
    default.
    """
    defaults = [a.default_value for a in op._schema.arguments]

    def kernel(*args: Any) -> Any:
        return function()(*args, *defaults[len(args) :])

    return kernel


def _kernel(op: OpOverload, path: str) -> Callable[..., Any]:
    return _complete(op, lambda: resolve(path))


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Launch with the tensors' device as the current one: Triton launches on the current device whatever it is
    given.
    """

    def guarded(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, Tensor) and a.is_cuda)
        if device.index == torch.cuda.current_device():
            return kernel(*args)
        with torch.cuda.device(device):
            return kernel(*args)

    return guarded


def register(
    schema: str,
    *,
    cpu: str,
    cuda: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    cast: Sequence[str] = (),
    flops: Callable[..., int] | None = None,
    inline: dict[str, str] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> OpOverload:
    """Register one operator under `torch.ops.fla`.

    schema         the full schema; sizes are SymInt, an in-place argument says `Tensor(a!)`
    cpu, cuda      "module:function" of the ATen and the Triton implementation, imported at the first launch
    fake           shapes, dtypes and argument checks; its parameters must be the schema's, in order
    setup_context  what the gradient keeps, as in `torch.autograd.Function`
    backward       the gradient, from other registered operators; without it, asking for a gradient is an error
    cast           arguments that autocast casts (activations only: gates and states keep their dtype)
    flops          FLOP formula over shapes, for `torch.utils.flop_counter`
    inline         per device type, "module:function" of a body that may stand in for the operator in compiled code
    """
    name = schema[: schema.index("(")].strip()
    qualified = f"{NAMESPACE}::{name}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    op: OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    arguments = [a.name for a in op._schema.arguments]
    if (taken := list(inspect.signature(fake).parameters)) != arguments:
        raise TypeError(f"{qualified}: the fake must take the schema's arguments {arguments}, got {taken}")

    LIBRARY.impl(name, _kernel(op, cuda if INTERPRETED else cpu), "CPU")
    LIBRARY.impl(name, _on_its_device(_kernel(op, cuda)), "CUDA")
    torch.library.register_fake(qualified, _complete(op, lambda: fake), lib=LIBRARY)
    LIBRARY.impl(name, _gradient.kernel(op, setup_context, backward), "Autograd", with_keyset=True)
    # With nothing to cast too: a kernel's own ATen calls, in a backward pass say, must not meet autocast.
    for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        LIBRARY.impl(name, _autocast.kernel(op, device, frozenset(arguments.index(c) for c in cast)), key)
    if flops is not None:
        _flops.register(op._overloadpacket, flops)
    if not INTERPRETED:
        _inline.register(op, inline or {}, resolve, LIBRARY)
    OPERATORS[name] = Operator(
        name=name,
        kind="inference" if backward is None else "differentiable",
        schema=str(op._schema),
        overload=op,
        cpu=cpu,
        cuda=cuda,
        inlines_on=tuple(inline or ()),
    )
    return op


def register_composite(schema: str, function: str) -> OpOverload:
    """Register an operator that only composes others: a trace shows what it called, autograd and autocast follow from
    those.
    """
    name = schema[: schema.index("(")].strip()
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op: OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    LIBRARY.impl(name, _kernel(op, function), "CompositeImplicitAutograd")
    OPERATORS[name] = Operator(name=name, kind="composite", schema=str(op._schema), overload=op)
    return op
