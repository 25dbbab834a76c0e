"""The Autocast kernel of an operator: casts activations to the autocast dtype, leaves gates and states alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor
from torch._ops import OpOverload


def kernel(op: OpOverload, device: str, cast: frozenset[int]) -> Callable[..., Any]:
    """The function to register under the Autocast key of `device`; `cast` holds the positions it may cast."""
    own_key = _C.DispatchKeySet(getattr(_C.DispatchKey, {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device]))

    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        args = tuple(
            a.to(dtype) if i in cast and isinstance(a, Tensor) and _castable(a, device) else a
            for i, a in enumerate(args)
        )
        with _C._ExcludeDispatchKeyGuard(own_key):
            return op(*args)

    return run


def _castable(x: Tensor, device: str) -> bool:
    return x.is_floating_point() and x.dtype is not torch.float64 and x.device.type == device
