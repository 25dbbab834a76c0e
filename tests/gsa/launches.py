"""The launches of gsa's kernels that take the most registers and shared memory, for each of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fla_ops.gsa.gpu import chunk, decoding, fused_recurrent

SIZES = {"batch": 2, "time": 128, "query_heads": 4, "heads": 2}  # widths decide, and whether a size divides by 16
CHUNK = 64
ALL = [True] * 7


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, on the host; keys and values have one width."""

    q: Tensor
    k: Tensor
    v: Tensor
    s: Tensor
    g: Tensor
    state_k: Tensor
    state_v: Tensor


def inputs(dtype: torch.dtype, width: int, slots: int) -> Inputs:
    batch, time, query_heads, heads = SIZES.values()
    return Inputs(
        q=torch.zeros(batch, time, query_heads, width, dtype=dtype),
        k=torch.zeros(batch, time, heads, width, dtype=dtype),
        v=torch.zeros(batch, time, heads, width, dtype=dtype),
        s=torch.zeros(batch, time, heads, slots),
        g=torch.zeros(batch, time, heads, slots),
        state_k=torch.zeros(batch, heads, width, slots),
        state_v=torch.zeros(batch, heads, slots, width),
    )


def chunk_forward(dtype: torch.dtype, width: int, slots: int) -> None:
    x = inputs(dtype, width, slots)
    chunk.forward(x.q, x.k, x.v, x.s, x.g, None, x.state_k, x.state_v, True, None, None, CHUNK, 2)


def chunk_backward(dtype: torch.dtype, width: int, slots: int, gated: bool = True) -> None:
    x = inputs(dtype, width, slots)
    states, recomputed = (x.state_k, x.state_v), (None, None, None, None)
    g, wanted = (x.g, ALL) if gated else (None, [*ALL[:4], False, *ALL[5:]])
    chunk.backward(x.q, x.k, x.v, x.s, g, *states, None, *recomputed, x.q, *states, None, CHUNK, wanted)


def chunk_backward_without_gates(dtype: torch.dtype, width: int, slots: int) -> None:
    chunk_backward(dtype, width, slots, gated=False)


def recurrent_forward(dtype: torch.dtype, width: int, slots: int) -> None:
    x = inputs(dtype, width, slots)
    fused_recurrent.forward(x.q, x.k, x.v, x.s, x.g, None, x.state_k, x.state_v, True, False, None, None)


def recurrent_backward(dtype: torch.dtype, width: int, slots: int) -> None:
    x = inputs(dtype, width, slots)
    states = (x.state_k, x.state_v)
    fused_recurrent.backward(x.q, x.k, x.v, x.s, x.g, *states, None, x.q, *states, None, False, ALL)


def recurrent_backward_to_values(dtype: torch.dtype, width: int, slots: int) -> None:
    x = inputs(dtype, width, slots)
    states, wanted = (x.state_k, x.state_v), [False, False, True, False, False, False, True]
    fused_recurrent.backward(x.q, x.k, x.v, x.s, x.g, *states, None, x.q, *states, None, False, wanted)


def step(dtype: torch.dtype, width: int, slots: int) -> None:
    x = inputs(dtype, width, slots)
    q, k, v, s, g = (y[:, 0].contiguous() for y in (x.q, x.k, x.v, x.s, x.g))
    decoding.step(q, k, v, s, g, x.state_k, x.state_v, None, torch.zeros(2, dtype=torch.int64))


CALLS: dict[str, list[Callable[[torch.dtype, int, int], None]]] = {
    "channel_state": [chunk_forward, chunk_backward],
    "channel_spread": [chunk_forward],
    "channel_contract": [chunk_forward, chunk_backward],
    "slot_gradient": [chunk_backward],
    "softmax_gradient": [chunk_backward],
    "slot_gates": [chunk_backward_without_gates],
    "slot_gates_gradient": [chunk_backward_without_gates],
    "channel_recurrent": [recurrent_forward, recurrent_backward, recurrent_backward_to_values],
    "channel_gate_gradient": [recurrent_backward],
    "gsa_decoding": [step],
}
