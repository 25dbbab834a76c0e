"""Sequence parallelism for models that are written in plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fla_ops.registrations._op import OPERATORS
from fla_ops.signature import Signature
from fla_ops.validation import letters_of


def along(mesh: Any, dim: int | str = 0) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run operators on sequences whose steps are spread over the ranks of a mesh dimension, in order, in equal pieces.

    Args:
        mesh: a `torch.distributed.device_mesh.DeviceMesh`.
        dim: the mesh dimension, by its name or number.

    Returns:
        A function that takes one of this package's public functions and returns it for pieces: `along(mesh, "cp")(
        fla_ops.simple_gla)` is called with this rank's steps [B, T / ranks, ...] of q, k, v and gates, and returns this
        rank's steps of o. Tensors without time (states, `g_gamma`, `cu_seqlens` of the whole sequences) are the same on
        every rank, and so are final states. The gradient of such an input is this rank's share: as those of a model's
        parameters, the gradients of all ranks are to be summed.

    Raises:
        TypeError: if the function is no operator's, or updates a pool in place.
        ValueError: if the mesh has no such dimension, or an operator without a state has heads that do not divide.
    """
    from torch.distributed.tensor import Shard

    line = _line_of(mesh, dim)

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        names = list(signature(function).parameters)
        pieces = {name: (Shard(axis),) for name, axis in _time_axes(function).items()}

        def on_pieces(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return _unwrapped(function(**{name: _wrapped(x, line, pieces.get(name)) for name, x in given.items()}))

        return on_pieces

    return of


def _line_of(mesh: Any, dim: int | str) -> Any:
    """The mesh of that one dimension."""
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1 and dim in (0, *names):
        return mesh
    if isinstance(dim, int) and dim < len(names):
        return mesh[names[dim]]
    if dim in names:
        return mesh[dim]
    raise ValueError(f"dim must be one of the mesh's dimensions, {names or list(range(mesh.ndim))}, got {dim!r}")


def _time_axes(function: Callable[..., Any]) -> dict[str, int]:
    """By argument, which of its axes is time."""
    name = getattr(function, "__name__", "")
    declaration = OPERATORS[name].declaration if name in OPERATORS else None
    if not isinstance(declaration, Signature) or declaration.mutated:
        raise TypeError(f"along wants a function such as fla_ops.simple_gla, got {name or function!r}")
    call = declaration.call
    axes = {argument: letters_of(text) for argument, text in call(**dict.fromkeys(call._fields)).axes.items()}
    return {argument: letters.index("T") for argument, letters in axes.items() if "T" in letters}


def _wrapped(x: Any, line: Any, piece: Any) -> Any:
    """An argument as a DTensor: a piece that is placed so, or the same on every rank."""
    from torch.distributed.tensor import DTensor, Replicate

    if isinstance(x, tuple | list):
        return tuple(_wrapped(part, line, piece) for part in x)
    if not isinstance(x, Tensor):
        return x
    if piece is not None:
        return DTensor.from_local(x, line, piece, run_check=False)
    whole = _Shared.apply(x, line.size()) if x.is_floating_point() else x  # type: ignore[no-untyped-call]
    return DTensor.from_local(whole, line, [Replicate()], run_check=False)


def _unwrapped(x: Any) -> Any:
    """A result as a plain tensor: a piece, or what is the same on every rank."""
    from torch.distributed.tensor import Partial, Replicate

    if isinstance(x, tuple | list):
        return tuple(_unwrapped(part) for part in x)
    if x is None:
        return None
    if x.placements[0].is_shard():
        return x.to_local()
    return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


class _Shared(torch.autograd.Function):
    """An input that is the same on every rank. Its gradient arrives whole on each; a share of it is this rank's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.ranks, None
