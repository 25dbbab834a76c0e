"""Lets a body of ATen (or traced Triton) calls stand in for an opaque operator while AOTAutograd traces a graph.

Off by default: an operator stays one node. With `inlining()` active, Inductor fuses the body with its surroundings,
and an AOTInductor package runs in a process that has never imported this package. `torch.export` keeps the operator
either way, until `run_decompositions(decompositions())` puts the bodies of ATen calls in its place.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental import _config, proxy_tensor

# In the key of PyTorch's compile caches: graphs with and without bodies must not mix. It is the only record of whether
# bodies are inlined, so that a graph is kept under the key by which it was traced: for the thread that asked or, where
# PyTorch's settings are those of all threads (up to 2.11), for all of them.
MARK = ";fla-inlined"

_DECOMPOSITIONS: dict[OpOverload, Callable[..., Any]] = {}

_changing = threading.Lock()


@contextlib.contextmanager
def inlining() -> Iterator[None]:
    """Within this context, compiled code and AOTInductor packages hold the operators' bodies instead of calls to them.

    Wrap `torch._inductor.aoti_compile_and_package(...)`, or the first call of a `torch.compile`d function, in the
    thread that makes it. Operators without a traceable body (see `Operator.inlines_on`) stay calls, with a warning.
    """
    config = torch.compiler.config
    with _changing:
        config.cache_key_tag += MARK
    try:
        yield
    finally:
        with _changing:  # one mark of however many contexts are open: they need not end in the order of their beginning
            config.cache_key_tag = config.cache_key_tag.replace(MARK, "", 1)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's decompositions to core ATen and those of this package, for `ExportedProgram.run_decompositions`.

    They serve programs on any device, and every operator of this package; one that others register without a body of
    ATen calls is refused with a NotImplementedError that names it.
    """
    return torch.export.default_decompositions().materialize() | _DECOMPOSITIONS


def active() -> bool:
    """Whether this thread's traces hold bodies."""
    return MARK in torch.compiler.config.cache_key_tag


def register(op: OpOverload, bodies: dict[str, Callable[..., Any]], library: torch.library.Library) -> None:
    """Register the rule of `op` for the functionalization mode; `bodies` maps a device type to a function of the
    operator's arguments.
    """

    def rule(mode: Any, overload: OpOverload, types: Any, args: Any, kwargs: Any) -> Any:
        if overload in _table():  # here, before an update in place becomes a call that no table can take apart
            with mode:
                return decomposition(*args)
        exporting = not torch._functorch.config.decompose_custom_triton_ops
        if exporting or not active():
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        if device not in bodies:
            _warn(str(overload), device)
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        with mode:
            return bodies[device](*args)

    def decomposition(*args: Any) -> Any:
        if "cpu" not in bodies:  # where bodies are ATen calls, which serve every device
            raise NotImplementedError(f"{op} has no body of ATen calls, and cannot be decomposed")
        # The sizes of an example decide as little as they can.
        with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            return bodies["cpu"](*args)

    _DECOMPOSITIONS[op] = decomposition
    torch.library.register_torch_dispatch(op._schema.name, FunctionalTensorMode, rule, lib=library)


def _table() -> Any:
    """The decompositions that are being traced with."""
    before = getattr(proxy_tensor, "CURRENT_DECOMPOSITION_TABLE", {})  # where the mode does not keep them
    return getattr(proxy_tensor.get_proxy_mode(), "decomposition_table", before)


@cache
def _warn(name: str, device: str) -> None:
    """Say once that an operator stays a call."""
    warnings.warn(
        f"{name} has no body to inline on {device}, and stays a call: a package with it runs only where fla_ops was "
        "imported",
        stacklevel=3,
    )
