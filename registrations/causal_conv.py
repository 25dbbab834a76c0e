"""causal_conv: which implementation runs where."""

from __future__ import annotations

from typing import Any

from fla_ops.causal_conv import call
from fla_ops.meta import causal_conv as fake

from ._op import register, register_backward


def _flops(c: Any) -> int:
    """A multiply-add for each tap."""
    batch, time, channels = c.x
    return int(2 * batch * time * channels * c.weight[1])


def _backward_flops(c: Any, *_: Any) -> int:
    """The sums again, the gradient of x and that of the weights."""
    return 3 * _flops(c)


def _step_flops(c: Any) -> int:
    sequences, channels = c.x
    return int(2 * sequences * channels * c.weight[1])


register(
    call.CONV,
    cpu="fla_ops.causal_conv.cpu.cpp:forward",
    cuda="fla_ops.causal_conv.gpu.convolve:forward",
    fake=fake.forward,
    gradient=call.GRADIENT,
    flops=_flops,
    inline={"cpu": "fla_ops.causal_conv.cpu.aten:forward"},
)
register_backward(
    call.GRADIENT,
    cpu="fla_ops.causal_conv.cpu.cpp:backward",
    cuda="fla_ops.causal_conv.gpu.convolve:backward",
    flops=_backward_flops,
    inline={"cpu": "fla_ops.causal_conv.cpu.aten:backward"},
)
register(
    call.STEP,
    cpu="fla_ops.causal_conv.cpu.cpp:step",
    cuda="fla_ops.causal_conv.gpu.decoding:step",
    fake=fake.step,
    flops=_step_flops,
    inline={"cpu": "fla_ops.causal_conv.cpu.aten:step"},
    tags=(),
)
