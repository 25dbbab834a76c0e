"""Runs a case on DTensors and in one process, and compares values and every gradient, in float64.

Every function here runs on each rank of a pool, and takes cases by their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests import numerics
from tests.cases import Case, Inputs, cases
from tests.contract.helpers import Named, cotangents, gradients, labelled, requiring

HEADS = ("H", "HK", "HQ")
LETTERS = {"replicate": (), "batch": ("B", "N"), "heads": HEADS, "time": ("T",), "pool": ("P",)}


@cache
def mesh_of(*sizes: int) -> DeviceMesh:
    """A mesh of these sizes, its dimensions called d0, d1, ..."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=tuple(f"d{i}" for i in range(len(sizes))))


@cache
def by_name() -> dict[str, Case]:
    """Every case."""
    return {str(case): case for case in cases()}


def place(case: Case, inputs: Inputs, axes: Sequence[str], mesh: DeviceMesh) -> Inputs:
    """Numbers as DTensors, each mesh dimension along an axis; offsets and slots stay plain, the same on every rank."""

    def placed(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        found = []
        for axis in axes:
            dims = [i for letter in LETTERS[axis] for i in case.axis(name, letter) if x.shape[i] > 1]
            found.append(Shard(dims[0]) if dims else Replicate())
        return distribute_tensor(x, mesh, found)

    return {name: placed(name, x) for name, x in inputs.items()}


def evaluate(case: Case, inputs: Inputs, arriving: Named | None = None) -> Named:
    """Outputs and gradients by name."""
    inputs = requiring(inputs, case.trained)
    outputs = dict(labelled(case.outputs, case.call(inputs)))
    if not case.trained:
        return outputs
    return outputs | gradients(outputs, inputs, arriving or cotangents(outputs), case.trained)


def whole(x: Tensor | None) -> Tensor | None:
    """A tensor as one process has it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(
    name: str,
    axes: Sequence[str],
    sizes: Mapping[str, Any] | None = None,
    ranks: Sequence[int] = (2,),
    dtype: torch.dtype = torch.float64,
) -> dict[str, list[str]]:
    """A case on a mesh of `ranks` along these axes against one process; the placements of what came out, as text."""
    case, mesh = by_name()[name].resized(**(sizes or {})), mesh_of(*ranks)
    inputs = case.inputs(dtype)
    expected = evaluate(case, inputs)
    arriving = cotangents({n: x for n, x in expected.items() if n in case.outputs})
    everywhere = [Replicate()] * mesh.ndim
    sent = {n: None if x is None else distribute_tensor(x, mesh, everywhere) for n, x in arriving.items()}
    found = evaluate(case, place(case, inputs, axes, mesh), sent)
    for n, x in expected.items():
        y = whole(found[n])
        assert (x is None) == (y is None), n
        if x is not None and y is not None:
            try:
                numerics.close(y, x, dtype)
            except AssertionError as wrong:
                raise AssertionError(f"{n} of {name} along {axes}: {wrong}") from None
    return {n: [str(p) for p in x.placements] for n, x in found.items() if isinstance(x, DTensor)}


def compare_all(calls: Sequence[tuple[Any, ...]]) -> list[dict[str, list[str]]]:
    """Several such comparisons."""
    return [compare(*call) for call in calls]
