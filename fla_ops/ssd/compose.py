"""ssd as simple_gla with C as queries, B as keys, dt x as values and A dt as decay: the bodies of both operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from fla_ops.common.replicated import replicated
from fla_ops.simple_gla import call as simple_gla
from fla_ops.validation import state_dtype

from . import checks
from .call import Call, Outputs, Step


def forward(c: Call) -> Outputs:
    """The body of torch.ops.fla.ssd."""
    checks.eager(c)
    c = replicated(c, *("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "seq_idx"))
    device = c.x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _forward(_cast(c, torch.get_autocast_dtype(device)))
    return _forward(c)


def step(c: Step) -> Tensor:
    """The body of torch.ops.fla.ssd_step_."""
    checks.eager_step(c)
    c = replicated(c, *("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "slots"))
    device = c.x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _step(_cast(c, torch.get_autocast_dtype(device)))
    return _step(c)


def _forward(c: Call) -> Outputs:
    dt = _step_sizes(c, c.dt_min, c.dt_max)
    g = c.A.to(dt.dtype) * dt
    if c.seq_idx is not None:
        # A decay of -inf is an exact reset. What comes before step 0 is sequence 0, as the initial state is.
        starts = c.seq_idx != pad(c.seq_idx, (1, 0))[:, :-1]
        g = g.masked_fill(starts[..., None], -math.inf)
    state: dict[str, Any] = {"initial_state": c.initial_state, "output_final_state": c.output_final_state}
    packing: dict[str, Any] = {"cu_seqlens": c.cu_seqlens, "cu_seqlens_cpu": c.cu_seqlens_cpu}
    settings: dict[str, Any] = {"scale": 1.0, "state_v_first": True, "chunk_size": c.chunk_size, "mode": c.mode}
    scan = simple_gla.Call(c.C, c.B, _values(c, dt), g, **state, **packing, **settings)
    o, final_state = torch.ops.fla.simple_gla(*simple_gla.DISPATCHER.arguments_of(scan))
    return Outputs(_skip_and_gate(c, o), final_state)


def _step(c: Step) -> Tensor:
    dt = _step_sizes(c, 0.0, None)
    g = c.A.to(dt.dtype) * dt
    scan = simple_gla.Step(c.C, c.B, _values(c, dt), c.state, g, None, 1.0, c.slots, state_v_first=True)
    o = _skip_and_gate(c, torch.ops.fla.simple_gla_step_(*simple_gla.STEP.arguments_of(scan)))
    if c.slots is None or (c.D is None and c.z is None):
        return o
    return torch.where((c.slots == -1)[:, None, None], 0, o)


def _cast(c: Any, dtype: torch.dtype) -> Any:
    """What autocast makes of the activations, cast once for all that reads them."""
    x, keys, queries = (y if y.dtype is torch.float64 else y.to(dtype) for y in (c.x, c.B, c.C))
    return c._replace(x=x, B=keys, C=queries)


def _step_sizes(c: Call | Step, least: float | None, most: float | None) -> Tensor:
    """Softplus and clamp of dt + dt_bias, in the dtype of the state; a softplus is above zero already."""
    dtype = state_dtype(c.x)
    dt = c.dt.to(dtype) if c.dt_bias is None else c.dt.to(dtype) + c.dt_bias.to(dtype)
    dt = softplus(dt) if c.dt_softplus else dt
    least = None if c.dt_softplus and least is not None and least <= 0 else least
    return dt if least is None and most is None else dt.clamp(least, most)


def _values(c: Call | Step, dt: Tensor) -> Tensor:
    return (c.x.to(dt.dtype) * dt[..., None]).to(c.x.dtype)


def _skip_and_gate(c: Call | Step, o: Tensor) -> Tensor:
    dtype = state_dtype(c.x)
    if c.D is not None:
        skip = c.D.to(dtype)
        o = torch.addcmul(o.to(dtype), c.x.to(dtype), skip if skip.dim() == 2 else skip[:, None])
    if c.z is not None:
        gate = c.z.to(dtype)
        o = o.to(dtype) * (gate * gate.sigmoid())  # silu's own gradient has other last bits under torch.func
    return o.to(c.x.dtype)
