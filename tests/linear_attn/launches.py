"""The launches of the normalisation's kernels that take the most registers and shared memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fla_ops.linear_attn.gpu import normalize

SIZES = {"batch": 2, "time": 128, "key_heads": 2, "heads": 4}  # widths decide, and whether a size divides by 16


def forward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    batch, time, key_heads, heads = SIZES.values()
    q = torch.zeros(batch, time, key_heads, key_width, dtype=dtype)
    o = torch.zeros(batch, time, heads, value_width, dtype=dtype)
    z = torch.zeros(batch, 1, heads, key_width)
    normalize.forward(q, q, o, None, z, True, False, None, None)


def backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    batch, time, key_heads, heads = SIZES.values()
    q = torch.zeros(batch, time, key_heads, key_width, dtype=dtype)
    o = torch.zeros(batch, time, heads, value_width, dtype=dtype)
    z = torch.zeros(batch, 1, heads, key_width)
    normalize.backward(q, q, o, z, None, o, z, None, False, [True, True, True, True])


def step(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    batch, _, key_heads, heads = SIZES.values()
    q, o = torch.zeros(batch, key_heads, key_width, dtype=dtype), torch.zeros(batch, heads, value_width, dtype=dtype)
    normalize.step(q, q, o, torch.zeros(batch, 1, heads, key_width), None, torch.zeros(batch, dtype=torch.int64))


CALLS: dict[str, list[Callable[[torch.dtype, int, int], None]]] = {
    "chunk_sum": [forward, backward],
    "chunk_scan": [forward, backward],
    "divide": [forward],
    "divide_backward": [backward],
    "running_sum": [backward],
    "normalize_step": [step],
}
