"""linear_attn: the normalisation is an operator with a gradient, all else composes it with simple_gla's operators."""

from __future__ import annotations

import math
from typing import Any

from fla_ops.linear_attn import call
from fla_ops.meta import linear_attn as fake

from ._op import register, register_backward, register_composite


def _flops(c: Any) -> int:
    """Sum, product and quotient, of one step or of all: they are far fewer than the numerator's."""
    rows: int = math.prod(c.o[:-1])
    return rows * (3 * int(c.q[-1]) + int(c.o[-1]))


def _backward_flops(c: Any, d: Any, *_: Any) -> int:
    """The denominator again, its gradient, and two running sums."""
    rows: int = math.prod(d.normalized[:-1])
    return rows * (7 * int(c.q[-1]) + 3 * int(d.normalized[-1]))


register(
    call.NORMALIZE,
    cpu="fla_ops.linear_attn.cpu.cpp:forward",
    cuda="fla_ops.linear_attn.gpu.normalize:forward",
    fake=fake.normalize,
    gradient=call.NORMALIZE_GRADIENT,
    flops=_flops,
    inline={"cpu": "fla_ops.linear_attn.cpu.aten:forward", "cuda": "fla_ops.linear_attn.gpu.normalize:forward"},
)
register_backward(
    call.NORMALIZE_GRADIENT,
    cpu="fla_ops.linear_attn.cpu.cpp:backward",
    cuda="fla_ops.linear_attn.gpu.normalize:backward",
    flops=_backward_flops,
    inline={"cpu": "fla_ops.linear_attn.cpu.aten:backward", "cuda": "fla_ops.linear_attn.gpu.normalize:backward"},
)
register(
    call.NORMALIZE_STEP,
    cpu="fla_ops.linear_attn.cpu.cpp:step",
    cuda="fla_ops.linear_attn.gpu.normalize:step",
    fake=fake.normalize_step,
    flops=_flops,
    inline={"cpu": "fla_ops.linear_attn.cpu.aten:step"},
    tags=(),
)
register_composite(call.CHUNK, "fla_ops.linear_attn.compose:chunk")
register_composite(call.FUSED_CHUNK, "fla_ops.linear_attn.compose:fused_chunk")
register_composite(call.RECURRENT, "fla_ops.linear_attn.compose:fused_recurrent")
register_composite(call.DISPATCHER, "fla_ops.linear_attn.forms:dispatch")
register_composite(call.STEP, "fla_ops.linear_attn.compose:step")
