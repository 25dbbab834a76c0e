"""The launches of simple_gla's kernels that take the most registers and shared memory, for each of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fla_ops.simple_gla.gpu import chunk, decoding, fused_chunk, fused_recurrent, parallel

SIZES = {"batch": 2, "time": 128, "key_heads": 2, "heads": 4}  # widths decide, and whether a size divides by 16
CHUNK = 256  # an entry's tile is never cut by it


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, on the host."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    g_gamma: Tensor
    state: Tensor


def inputs(dtype: torch.dtype, key_width: int, value_width: int) -> Inputs:
    batch, time, key_heads, heads = SIZES.values()
    return Inputs(
        q=torch.zeros(batch, time, key_heads, key_width, dtype=dtype),
        k=torch.zeros(batch, time, key_heads, key_width, dtype=dtype),
        v=torch.zeros(batch, time, heads, value_width, dtype=dtype),
        g=torch.zeros(batch, time, heads),
        g_gamma=torch.zeros(heads),
        state=torch.zeros(batch, heads, key_width, value_width),
    )


def chunk_forward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    x = inputs(dtype, key_width, value_width)
    chunk.forward(x.q, x.k, x.v, x.g, None, None, x.state, True, False, None, None, CHUNK)


def chunk_backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    x = inputs(dtype, key_width, value_width)
    wanted = [True, True, True, True, False, True]
    chunk.backward(x.q, x.k, x.v, x.g, None, x.state, None, x.v, x.state, None, False, CHUNK, wanted)


def fused_chunk_forward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    x = inputs(dtype, key_width, value_width)
    fused_chunk.forward(x.q, x.k, x.v, x.g, None, None, x.state, True, False, None, None, CHUNK)


def fused_chunk_backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    x = inputs(dtype, key_width, value_width)
    wanted = [True, True, True, False, False, True]
    fused_chunk.backward(x.q, x.k, x.v, x.g, None, x.state, None, x.v, x.state, None, False, CHUNK, wanted)


def fused_recurrent_backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    x = inputs(dtype, key_width, value_width)
    wanted = [True, True, True, True, False, True]
    fused_recurrent.backward(x.q, x.k, x.v, x.g, None, x.state, None, x.v, x.state, None, False, False, wanted)


def parallel_backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    x = inputs(dtype, key_width, value_width)
    parallel.backward(x.q, x.k, x.v, x.g, None, None, x.v, None, None, [True, True, True, True, False])


def parallel_forward_with_attentions(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    x = inputs(dtype, key_width, value_width)
    parallel.forward(x.q, x.k, x.v, x.g, None, None, True, None, None)


def step(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    x = inputs(dtype, key_width, value_width)
    q, k, v, g = (y[:, 0].contiguous() for y in (x.q, x.k, x.v, x.g))
    decoding.step(q, k, v, x.state, g, None, None, torch.zeros(2, dtype=torch.int64))


CALLS: dict[str, list[Callable[[torch.dtype, int, int], None]]] = {
    "chunk_state": [chunk_backward],
    "chunk_output": [chunk_forward],
    "chunk_backward": [chunk_backward],
    "fused_chunk": [fused_chunk_forward, fused_chunk_backward],
    "fused_recurrent": [fused_recurrent_backward],
    "parallel": [parallel_backward, parallel_forward_with_attentions],
    "decoding": [step],
    "gate_gradient": [parallel_backward],
    "windowed_gate_gradient": [fused_recurrent_backward],
    "group_sum": [chunk_backward],
}
