"""The operators on torch.distributed: DTensors in, DTensors out.

Importing this package imports nothing of torch.distributed. The rule by which operators run on DTensors is registered
when `torch.distributed.tensor` is imported; see docs/distributed.md.
"""

from __future__ import annotations

from typing import Any

from fla_ops.registrations._when_imported import when_imported

from .along import along


def _register(module: Any) -> None:
    from .rule import register

    register(module.DTensor)


__all__ = ["along"]
when_imported("torch.distributed.tensor", _register)
