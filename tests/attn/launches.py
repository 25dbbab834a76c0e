"""The launches of attn's kernels that take the most registers and shared memory, for each of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fla_ops.attn.gpu import decoding, parallel, parallel_backward

SIZES = {"batch": 1, "time": 256, "query_heads": 4, "heads": 2}  # widths decide, and whether a size divides by 16
WINDOW = 100


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, on the host."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    sink_bias: Tensor
    o: Tensor
    lse: Tensor


def inputs(dtype: torch.dtype, key_width: int, value_width: int) -> Inputs:
    batch, time, query_heads, heads = SIZES.values()
    return Inputs(
        q=torch.zeros(batch, time, query_heads, key_width, dtype=dtype),
        k=torch.zeros(batch, time, heads, key_width, dtype=dtype),
        v=torch.zeros(batch, time, heads, value_width, dtype=dtype),
        g=torch.zeros(batch, time, query_heads),
        sink_bias=torch.zeros(query_heads),
        o=torch.zeros(batch, time, query_heads, value_width, dtype=dtype),
        lse=torch.zeros(batch, time, query_heads),
    )


def forward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    x = inputs(dtype, key_width, value_width)
    parallel.forward(x.q, x.k, x.v, x.g, None, WINDOW, None, None, x.sink_bias, True)


def backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    x = inputs(dtype, key_width, value_width)
    rest = None if dtype is torch.float32 else x.o
    parallel_backward.backward(
        x.q, x.k, x.v, x.g, x.sink_bias, None, x.o, x.lse, rest, x.o, x.lse, None, WINDOW, [True] * 5
    )


def step(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    x = inputs(dtype, key_width, value_width)
    offsets = torch.tensor([0, SIZES["time"]])
    decoding.one_step(x.q[:, :1], x.k, x.v, x.g, None, offsets, False, x.sink_bias, WINDOW)


CALLS: dict[str, list[Callable[[torch.dtype, int, int], None]]] = {
    "attn_forward": [forward],
    "attn_query_gradient": [backward],
    "attn_key_gradient": [backward],
    "attn_decay_sums": [backward],
    "attn_decay_gradient": [backward],
    "attn_row_terms": [backward],
    "attn_decoding": [step],
    "attn_join": [step],
}
