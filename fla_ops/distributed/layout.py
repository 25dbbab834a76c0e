"""The arguments of a call as this rank has them, and its results as DTensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .sharding import POOL, TIME, VIA_HEADS, Arguments, Sharding

Placements = list[Any]
Results = dict[str, "Tensor | None"]


def placements(s: Sharding, name: str, lacking: Any = None) -> Placements:
    """Where a tensor goes: along its first axis that a mesh dimension shards. `lacking` is for mesh dimensions that
    shard axes of others only; by default such a tensor is whole on every rank.
    """
    found: Placements = []
    for d in range(s.mesh.ndim):
        letters = s.sharded(d)
        along = (Shard(i) for i, letter in enumerate(s.of(name)) if letter in letters)
        found.append(next(along, (lacking or Replicate()) if letters else Replicate()))
    return found


def local_arguments(s: Sharding) -> Arguments:
    """The arguments that this rank runs the operator on. A plain tensor counts as the same on every rank."""
    local = dict(s.arguments)
    for name, x in s.tensors.items():
        local[name] = _local(s, name, x, placements(s, name))
        if name in s.arriving:
            local[name] = _share(s, name, local[name])
    return local


def _local(s: Sharding, name: str, x: Tensor, wanted: Placements) -> Tensor:
    """A rank's part of a tensor that is placed as wanted."""
    whole = [Replicate()] * s.mesh.ndim
    is_plain = not isinstance(x, DTensor)
    if is_plain and wanted == whole:
        return x
    placed: Any = DTensor.from_local(x.detach(), s.mesh, whole, run_check=False) if is_plain else x
    if list(placed.placements) != wanted:
        if name in s.mutated:
            raise ValueError(
                f"{s.name} updates {name} in place: it cannot move from {list(placed.placements)} to {wanted}"
            )
        placed = placed.detach().redistribute(s.mesh, wanted)
    local: Tensor = placed.to_local()
    return local


def _share(s: Sharding, name: str, gradient: Tensor) -> Tensor:
    """A rank's share of the gradient of an output that several ranks have computed alike: the gradients of what each of
    them holds are summed. (Along time the exchange sees to that.)
    """
    ranks = 1
    for d in range(s.mesh.ndim):
        letters = s.sharded(d)
        if letters and s.axes[d] != TIME and not letters & set(s.of(name)):
            ranks *= s.mesh.size(d)
    return gradient if ranks == 1 else gradient / ranks


def run(s: Sharding, arguments: Arguments) -> Results:
    """The operator's results by name."""
    returned, names = s.operator.overload(*arguments.values()), s.operator.declaration.results
    values = returned if isinstance(returned, tuple) else (returned,) * len(names)
    return dict(zip(names, values, strict=True))


def wrapped(s: Sharding, results: Results, in_time: Mapping[str, Any] | None = None) -> Any:
    """The results as the operator returns them. The gradient of a plain tensor is a plain tensor.

    A result without a sharded axis is the same on every rank, or a sum over the ranks: gradients are, and so is what
    comes of a pool of which each rank holds some rows. `in_time` has other placements on the mesh dimension of time.
    """
    lacking = Partial() if s.is_backward or POOL in s.axes else Replicate()
    outputs: list[Tensor | None] = []
    for name in s.operator.declaration.results:
        x = results[name]
        if x is None:
            outputs.append(None)
            continue
        found = placements(s, name, lacking)
        if in_time and name in in_time:
            found = [in_time[name] if axis == TIME else p for axis, p in zip(s.axes, found, strict=True)]
        shape = [_whole(s, c, n) for c, n in zip(s.of(name), x.shape, strict=True)]
        y = _dtensor(s, x, found, shape)
        if s.is_backward and not isinstance(s.arguments.get(name[1:]), DTensor | None):
            outputs.append(y.full_tensor())
            continue
        home = _home(s, name, found)
        outputs.append(y if home == found else y.redistribute(s.mesh, home))
    if len(outputs) > 1:
        return tuple(outputs)
    return outputs[0] if outputs else None


def _dtensor(s: Sharding, x: Tensor, found: Placements, shape: list[Any]) -> DTensor:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    return DTensor.from_local(
        x.contiguous(), s.mesh, found, run_check=False, shape=torch.Size(shape), stride=tuple(strides[: len(shape)])
    )


def _whole(s: Sharding, letter: str, size: Any) -> Any:
    """The size of an axis over all ranks."""
    ranks = s.ranks(letter)
    return size if ranks == 1 else s.sizes.get(letter, size * ranks)


def _home(s: Sharding, name: str, found: Placements) -> Placements:
    """Where a result belongs that was computed along heads because its time is sharded: back along time. A gradient
    goes where its input is.
    """
    home = list(found)
    for d, axis in enumerate(s.axes):
        if axis != VIA_HEADS:
            continue
        x = s.arguments.get(name[1:]) if s.is_backward else None
        if isinstance(x, DTensor) and not x.placements[d].is_partial():
            home[d] = x.placements[d]
        elif "T" in s.of(name):
            home[d] = Shard(s.of(name).index("T"))
    return home
