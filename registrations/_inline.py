"""Lets a body of ATen (or traced Triton) calls stand in for an opaque operator while AOTAutograd traces a graph.

Off by default: an operator stays one node. With `inlining()` active, Inductor fuses the body with its surroundings,
and an AOTInductor package runs in a process that has never imported this package. `torch.export` keeps the operator
either way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.functional_tensor import FunctionalTensorMode


class _State:
    active = False


@contextlib.contextmanager
def inlining() -> Iterator[None]:
    """Within this context, compiled code and AOTInductor packages hold the operators' bodies instead of calls to them.

    Wrap `torch._inductor.aoti_compile_and_package(...)`, or the first call of a `torch.compile`d function.
    Operators without a traceable body (see `Operator.inlines_on`) stay calls.
    """
    previous, key = _State.active, torch.compiler.config.cache_key_tag
    _State.active = True
    torch.compiler.config.cache_key_tag = f"{key};fla-inlined"  # cached graphs with and without bodies must not mix
    try:
        yield
    finally:
        _State.active = previous
        torch.compiler.config.cache_key_tag = key


def register(op: OpOverload, bodies: dict[str, Callable[..., Any]], library: torch.library.Library) -> None:
    """Register the rule of `op` for the functionalization mode; `bodies` maps a device type to a function of the
    operator's arguments.
    """

    def rule(mode: Any, overload: OpOverload, types: Any, args: Any, kwargs: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        exporting = not torch._functorch.config.decompose_custom_triton_ops
        if not _State.active or exporting or device not in bodies:
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        with mode:
            return bodies[device](*args)

    torch.library.register_torch_dispatch(op._schema.name, FunctionalTensorMode, rule, lib=library)
