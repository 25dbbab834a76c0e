"""The launches of the normalisation's kernels that take the most registers and shared memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fla_ops.linear_attn.call import Need, Normalize, Normalized, NormalizeStep
from fla_ops.linear_attn.gpu import normalize

SIZES = {"batch": 2, "time": 128, "key_heads": 2, "heads": 4}  # widths decide, and whether a size divides by 16


def call(dtype: torch.dtype, key_width: int, value_width: int) -> Normalize:
    """Arguments of one call, on the host."""
    batch, time, key_heads, heads = SIZES.values()
    q = torch.zeros(batch, time, key_heads, key_width, dtype=dtype)
    o = torch.zeros(batch, time, heads, value_width, dtype=dtype)
    return Normalize(q, q, o, None, torch.zeros(batch, 1, heads, key_width), output_final_z=True)


def forward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    normalize.forward(call(dtype, key_width, value_width))


def backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    normalize.backward(c, Normalized(c.o, c.initial_z), Need(True, True, True, True), Normalized(c.o, None))


def step(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    q, o = c.q[:, 0].contiguous(), c.o[:, 0].contiguous()
    normalize.step(NormalizeStep(q, q, o, c.initial_z, None, torch.tensor([0, 1])))


CALLS: dict[str, list[Callable[[torch.dtype, int, int], None]]] = {
    "chunk_sum": [forward, backward],
    "chunk_scan": [forward, backward],
    "divide": [forward],
    "divide_backward": [backward],
    "running_sum": [backward],
    "normalize_step": [step],
}
