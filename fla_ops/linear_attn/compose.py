"""linear_attn from simple_gla's operators and the normalisation: the bodies of the composite operators.

The read-out before the division grows with time. float16 ends at 65504, so there a normalised run computes in float32
and rounds the quotient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fla_ops.signature import Signature
from fla_ops.simple_gla import call as simple_gla

from . import checks
from .call import NORMALIZE, Call, Normalize, Outputs, Step


def chunk(c: Call) -> Outputs:
    """The body of torch.ops.fla.chunk_linear_attn."""
    return _run(c, simple_gla.CHUNK)


def fused_chunk(c: Call) -> Outputs:
    """The body of torch.ops.fla.fused_chunk_linear_attn."""
    return _run(c, simple_gla.FUSED_CHUNK)


def fused_recurrent(c: Call) -> Outputs:
    """The body of torch.ops.fla.fused_recurrent_linear_attn."""
    return _run(c, simple_gla.RECURRENT)


def step(c: Step) -> Tensor:
    """The body of torch.ops.fla.linear_attn_step_.

    simple_gla_step_ refuses before it updates; what only the division would refuse, after it, is refused here.
    """
    checks.eager_whole_step(c)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        o = torch.ops.fla.simple_gla_step_(q, k, v, c.state, None, None, c.scale, c.slots, c.state_v_first)
        return (torch.ops.fla.normalize_output_step_(q, k, o, c.z, c.scale, c.slots),)

    o: Tensor
    (o,) = _as_activations(run, c.q, c.k, c.v)
    return o


def _run(c: Call, form: Signature) -> Outputs:
    """The read-out of one of simple_gla's forms, divided by scale q_t . z_t + 1e-10 if the call is normalised."""
    checks.pair(c)
    operator: Any = getattr(torch.ops.fla, form.name)

    def read(q: Tensor, k: Tensor, v: Tensor) -> Any:
        packing: dict[str, Any] = {"cu_seqlens": c.cu_seqlens, "cu_seqlens_cpu": c.cu_seqlens_cpu}
        state: dict[str, Any] = {
            "initial_state": c.initial_state,
            "output_final_state": c.output_final_state,
            "reverse": c.reverse,
        }
        return operator(
            *form.arguments_of(simple_gla.Call(q, k, v, scale=c.scale, **state, **packing, chunk_size=c.chunk_size))
        )

    def normalized(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        o, final_state = read(q, k, v)
        settings = (c.scale, c.initial_z, c.output_final_state, c.reverse, c.cu_seqlens, c.cu_seqlens_cpu)
        o, final_z = torch.ops.fla.normalize_output(*NORMALIZE.arguments_of(Normalize(q, k, o, *settings)))
        return Outputs(o, final_state, final_z)

    if not c.normalize:
        o, final_state = read(c.q, c.k, c.v)
        return Outputs(o, final_state, None)
    return Outputs(*_as_activations(normalized, c.q, c.k, c.v))


def _as_activations(run: Callable[[Tensor, Tensor, Tensor], Any], q: Tensor, k: Tensor, v: Tensor) -> Any:
    """`run` with what autocast makes of the activations, cast once for all operators, and with float16 in float32.

    The first result is rounded to the activations' dtype.
    """
    device = v.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (x if x.dtype is torch.float64 else x.to(dtype) for x in (q, k, v))
        with torch.autocast(device, enabled=False):
            return _as_activations(run, q, k, v)
    if not q.dtype is k.dtype is v.dtype is torch.float16:
        return run(q, k, v)
    o, *states = run(q.float(), k.float(), v.float())
    return o.to(torch.float16), *states
