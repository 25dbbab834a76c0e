"""Plain tensors beside DTensors, for composites: their parts go to DTensor's own rules, which do not mix the two."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def replicated(call: Any, *names: str) -> Any:
    """The call with its plain tensors of these names as DTensors, the same on every rank, where any is a DTensor."""
    if "torch.distributed.tensor" not in sys.modules:
        return call
    from torch.distributed.tensor import DTensor, Replicate

    mesh = next((x.device_mesh for x in call if isinstance(x, DTensor)), None)
    if mesh is None:
        return call
    plain = {name: x for name in names if isinstance(x := getattr(call, name), Tensor) and not isinstance(x, DTensor)}
    whole = [Replicate()] * mesh.ndim
    return call._replace(**{name: DTensor.from_local(x, mesh, whole, run_check=False) for name, x in plain.items()})
