"""The calls that wire an operator into PyTorch: schema, kernels, fake, gradient, autocast, FLOP formula, inlining."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload

from fla_ops import launch
from fla_ops.signature import Gradient, Signature

from . import _autocast, _flops, _gradient, _inline, _taken, _vmap

NAMESPACE = "fla"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
ACTIVATIONS = ("q", "k", "v", "o", "x")  # what autocast casts: gates, biases and states keep their dtype

# Triton's own switch: with it set, a kernel runs on host tensors, so the CPU key takes the Triton launchers.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

Function = Callable[..., Any]


@dataclass(frozen=True)
class Operator:
    """What is registered under one name: the contract tests and `fla_ops.ops()` read this record."""

    name: str
    kind: Literal["differentiable", "inference", "composite"]
    schema: str
    overload: OpOverload
    declaration: Signature | Gradient
    cpu: str | None = None
    cuda: str | None = None
    inlines_on: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind:14s} {self.schema}"


OPERATORS: dict[str, Operator] = {}


@cache
def resolve(path: str) -> Function:
    """The function that "package.module:function" names, imported on first use."""
    module, function = path.split(":")
    found: Function = getattr(importlib.import_module(module), function)
    return found


def _on_the_host(cpu: str, cuda: str) -> Function:
    """The implementation for host tensors: the GPU's where its kernels are interpreted, or only recorded."""
    return resolve(cuda if INTERPRETED or launch.is_elsewhere() else cpu)


def register(
    signature: Signature,
    *,
    cpu: str,
    cuda: str,
    fake: Function,
    gradient: Gradient | None = None,
    flops: Function | None = None,
    inline: dict[str, str] | None = None,
    tags: Sequence[torch.Tag] = (torch.Tag.needs_contiguous_strides,),
) -> None:
    """Register one operator under `torch.ops.fla`.

    signature  its arguments and results; the functions below take its call
    cpu, cuda  "module:function" of the implementations, imported at the first launch
    fake       checks the call and returns empty results
    gradient   what differentiates it, registered by `register_backward`; without it, asking for a gradient is an error
    flops      FLOP formula over a call of shapes, for `torch.utils.flop_counter`
    inline     per device type, "module:function" of a body that may stand in for the operator in compiled code
    """
    if not _taken.is_free(NAMESPACE, signature.name):
        return

    def adapt(function: Callable[[], Function]) -> Function:
        return lambda *args: signature.returned(function()(signature.call_of(args)))

    op = _define(signature, signature.schema, tags)
    if flops is not None:
        _flops.register(op._overloadpacket, lambda *args, **_: flops(signature.call_of(args)))
    cast = frozenset(i for i, name in enumerate(signature.fields) if name in ACTIVATIONS)
    kernels = _wire(op, signature, adapt, cpu, cuda, fake, cast, inline)
    positions = [signature.fields.index(name) for name in signature.mutated]
    LIBRARY.impl(signature.name, _gradient.kernel(op, gradient, kernels, positions), "Autograd", with_keyset=True)
    if positions:
        LIBRARY.impl(signature.name, _gradient.version_kernel(op, positions), "ADInplaceOrView", with_keyset=True)
    _record(signature, op, "differentiable" if gradient else "inference", cpu, cuda, tuple(inline or ()))


def register_backward(
    gradient: Gradient,
    *,
    cpu: str,
    cuda: str,
    flops: Function | None = None,
    inline: dict[str, str] | None = None,
    tags: Sequence[torch.Tag] = (torch.Tag.needs_contiguous_strides,),
) -> None:
    """Register the operator that computes a gradient. Its functions take the call, the outputs' gradients, the flags of
    what is wanted, and the saved outputs if there are any. They return a gradient, or None, for each flag.
    """
    if not _taken.is_free(NAMESPACE, gradient.name):
        return

    def adapt(function: Callable[[], Function]) -> Function:
        return lambda *args: function()(*gradient.parts_of(args))

    op = _define(gradient, gradient.schema, tags)
    if flops is not None:
        _flops.register(op._overloadpacket, lambda *args, **_: flops(*gradient.parts_of(args)))
    kernels = _wire(op, gradient, adapt, cpu, cuda, _like_inputs, frozenset(), inline)
    LIBRARY.impl(gradient.name, _gradient.refusing_later(op, kernels), "Autograd", with_keyset=True)
    _record(gradient, op, "inference", cpu, cuda, tuple(inline or ()))


def register_composite(signature: Signature, function: str) -> None:
    """Register an operator that only composes others: a trace shows what it called, autograd and autocast follow from
    those.
    """
    if not _taken.is_free(NAMESPACE, signature.name):
        return
    op = _define(signature, signature.schema, ())
    for key in ("CompositeImplicitAutograd", "FuncTorchBatched", "Batched"):
        LIBRARY.impl(signature.name, lambda *args: signature.returned(resolve(function)(signature.call_of(args))), key)
    _record(signature, op, "composite")


def _define(declaration: Signature | Gradient, schema: str, tags: Sequence[torch.Tag]) -> OpOverload:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    op: OpOverload = getattr(getattr(torch.ops, NAMESPACE), declaration.name).default
    return op


def _record(declaration: Signature | Gradient, op: OpOverload, kind: Any, *implementations: Any) -> None:
    name = declaration.name
    OPERATORS[name] = Operator(name, kind, str(op._schema), op, declaration, *implementations)


def _wire(
    op: OpOverload,
    declaration: Signature | Gradient,
    adapt: Callable[[Callable[[], Function]], Function],
    cpu: str,
    cuda: str,
    fake: Function,
    cast: frozenset[int],
    inline: dict[str, str] | None,
) -> _gradient.Kernels:
    """Register what runs below autograd; `adapt` turns a function of the declaration's parts into one of arguments.

    Returns the backends' kernels.
    """
    qualified, name = op._schema.name, op._opname
    kernels = {
        DispatchKey.CPU: adapt(partial(_on_the_host, cpu, cuda)),
        DispatchKey.CUDA: _on_its_device(adapt(partial(resolve, cuda))),
    }
    for backend, function in kernels.items():
        LIBRARY.impl(name, function, backend.name)
    torch.library.register_fake(qualified, adapt(lambda: fake), lib=LIBRARY)
    # With nothing to cast too: a kernel's own ATen calls, in a backward pass say, must not meet autocast.
    for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        LIBRARY.impl(name, _autocast.kernel(op, device, cast), key)
    batched = _vmap.rule(op, declaration)
    torch.library.register_vmap(qualified, batched, lib=LIBRARY)
    LIBRARY.impl(name, _vmap.legacy_kernel(batched), "Batched")
    if not INTERPRETED:
        bodies = {device: adapt(partial(resolve, path)) for device, path in (inline or {}).items()}
        _inline.register(op, bodies, LIBRARY)
    return kernels


def _on_its_device(kernel: Function) -> Function:
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


def _like_inputs(call: Any, gradients: Any, need: Any, saved: Any = ()) -> tuple[Tensor | None, ...]:
    """The fake of a backward operator: each gradient is like its input; one that was not saved is like the output."""
    inputs = (getattr(call, name) for name in need._fields)
    like = (saved[0] if x is None and saved else x for x in inputs)
    return tuple(x.new_empty(x.shape) if wanted else None for wanted, x in zip(need, like, strict=True))
