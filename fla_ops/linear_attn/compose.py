"""linear_attn from simple_gla's operators and the normalisation: the bodies of the composite operators.

The read-out before the division grows with time. float16 ends at 65504, so there a normalised run computes in float32
and rounds the quotient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import checks

Result = tuple[Tensor, Tensor | None, Tensor | None]


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    initial_z: Tensor | None,
    output_final_state: bool,
    normalize: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    chunk_size: int,
    operator: str = "chunk_simple_gla",
) -> Result:
    """The body of torch.ops.fla.chunk_linear_attn, and with another operator of fused_chunk_linear_attn."""
    checks.pair(initial_state, initial_z, normalize)
    state, packing = (initial_state, output_final_state), (cu_seqlens, cu_seqlens_cpu)

    def read(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return getattr(torch.ops.fla, operator)(q, k, v, None, None, scale, *state, False, *packing, chunk_size)

    if not normalize:
        return *read(q, k, v), None
    return _normalized(read, q, k, v, scale, initial_z, output_final_state, False, *packing)


fused_chunk = partial(chunk, operator="fused_chunk_simple_gla")


def fused_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    initial_z: Tensor | None,
    output_final_state: bool,
    reverse: bool,
    normalize: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
) -> Result:
    """The body of torch.ops.fla.fused_recurrent_linear_attn."""
    checks.pair(initial_state, initial_z, normalize)
    state, packing = (initial_state, output_final_state), (cu_seqlens, cu_seqlens_cpu)

    def read(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.ops.fla.fused_recurrent_simple_gla(q, k, v, None, None, scale, *state, reverse, False, *packing)

    if not normalize:
        return *read(q, k, v), None
    return _normalized(read, q, k, v, scale, initial_z, output_final_state, reverse, *packing)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor, scale: float | None, slots: Tensor | None
) -> Tensor:
    """The body of torch.ops.fla.linear_attn_step_. simple_gla_step_ refuses before it updates; what only the division
    would refuse, after it, is refused here.
    """
    checks.launch_step(q, k, v, z, slots, "v")
    checks.pools(state, z)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        o = torch.ops.fla.simple_gla_step_(q, k, v, state, None, None, scale, slots)
        return (torch.ops.fla.normalize_output_step_(q, k, o, z, scale, slots),)

    o: Tensor
    (o,) = _as_activations(run, q, k, v)
    return o


def _normalized(
    read: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    initial_z: Tensor | None,
    output_final_z: bool,
    reverse: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
) -> Result:
    """What `read` reads out, divided by scale q_t . z_t + 1e-10."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Result:
        o, final_state = read(q, k, v)
        o, final_z = torch.ops.fla.normalize_output(
            q, k, o, scale, initial_z, output_final_z, reverse, cu_seqlens, cu_seqlens_cpu
        )
        return o, final_state, final_z

    o, final_state, final_z = _as_activations(run, q, k, v)
    return o, final_state, final_z


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
