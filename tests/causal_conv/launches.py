"""The launches of causal_conv's kernels that take the most registers and shared memory, for each of its kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fla_ops.causal_conv.call import Call, Need, Outputs, Step
from fla_ops.causal_conv.gpu import convolve, decoding

SIZES = {"batch": 2, "time": 128, "heads": 4}  # so many times `value_width` channels
TAPS = 8


def call(dtype: torch.dtype, value_width: int) -> Call:
    """Arguments of one call, on the host."""
    batch, time, heads = SIZES.values()
    channels = heads * value_width
    return Call(
        x=torch.zeros(batch, time, channels, dtype=dtype),
        weight=torch.zeros(channels, TAPS),
        bias=torch.zeros(channels),
        initial_state=torch.zeros(batch, channels, TAPS - 1),
        output_final_state=True,
        activation="silu",
    )


def forward(dtype: torch.dtype, _key_width: int, value_width: int) -> None:
    convolve.forward(call(dtype, value_width))


def backward(dtype: torch.dtype, _key_width: int, value_width: int) -> None:
    c = call(dtype, value_width)
    convolve.backward(c, Outputs(c.x, c.initial_state), Need(True, True, True, True))


def step(dtype: torch.dtype, _key_width: int, value_width: int) -> None:
    c = call(dtype, value_width)
    slots = torch.arange(c.x.shape[0])
    decoding.step(Step(c.x[:, 0].contiguous(), c.initial_state, c.weight, c.bias, c.activation, slots))


CALLS: dict[str, list[Callable[[torch.dtype, int, int], None]]] = {
    "conv_forward": [forward],
    "conv_final_state": [forward, backward],
    "conv_weight_gradient": [backward],
    "conv_input_gradient": [backward],
    "conv_step": [step],
}
