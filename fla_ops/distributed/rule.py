"""The rule by which every operator runs on DTensors, registered when `torch.distributed.tensor` is imported.

`torch.library.register_torch_dispatch` hands a call to the rule before DTensor's own dispatch. That matters: DTensor
takes a name that ends in an underscore to mean "returns its first argument", and does not mix plain tensors in.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fla_ops.registrations._op import LIBRARY, NAMESPACE, OPERATORS, Operator

from . import in_time, layout
from .sharding import POOL, TIME, Arguments, Sharding


def register(dtensor: Any) -> None:
    """Give every operator that does more than compose others the rule, for this class of tensors."""
    for name, operator in OPERATORS.items():
        if operator.kind != "composite":
            rule = partial(dispatch, operator)
            torch.library.register_torch_dispatch(f"{NAMESPACE}::{name}", dtensor, rule, lib=LIBRARY)


def dispatch(operator: Operator, cls: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Run an operator on DTensors: find its axes, bring the arguments there, run it on local tensors, wrap results."""
    with torch.no_grad():
        sharding = Sharding(operator, args, kwargs or {})
        arguments = layout.local_arguments(sharding)
        if POOL in sharding.axes:
            arguments["slots"] = _own_slots(sharding, arguments)
        if TIME in sharding.axes:
            run = in_time.backward if sharding.is_backward else in_time.forward
            return run(sharding, arguments)
        return layout.wrapped(sharding, layout.run(sharding, arguments))


def _own_slots(s: Sharding, arguments: Arguments) -> Any:
    """The slots that are rows of this rank's part of the pool; the others become padding, whose output is zero."""
    low, held = 0, s.sizes["P"]
    for d, axis in enumerate(s.axes):  # each mesh dimension cuts what the ones before it have left
        if axis == POOL:
            rows = -(-held // s.mesh.size(d))
            start = min(rows * s.mesh.get_local_rank(d), held)
            low, held = low + start, min(rows, held - start)
    slots: Tensor = arguments["slots"]
    own = slots - low
    return torch.where((slots >= 0) & (own >= 0) & (own < held), own, -1)
