"""The launches of gsa's kernels that take the most registers and shared memory, for each of its kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fla_ops.gsa.call import Call, Kept, Need, Outputs, Step
from fla_ops.gsa.gpu import chunk, decoding, fused_recurrent

SIZES = {"batch": 2, "time": 128, "query_heads": 4, "heads": 2}  # widths decide, and whether a size divides by 16
ALL = Need(*[True] * 7)
NOTHING_KEPT = Kept(*[None] * 7)


def call_of(dtype: torch.dtype, width: int, slots: int) -> Call:
    """A call on the host; keys and values have one width."""
    batch, time, query_heads, heads = SIZES.values()
    return Call(
        q=torch.zeros(batch, time, query_heads, width, dtype=dtype),
        k=torch.zeros(batch, time, heads, width, dtype=dtype),
        v=torch.zeros(batch, time, heads, width, dtype=dtype),
        s=torch.zeros(batch, time, heads, slots),
        g=torch.zeros(batch, time, heads, slots),
        initial_k=torch.zeros(batch, heads, width, slots),
        initial_v=torch.zeros(batch, heads, slots, width),
        output_final_state=True,
    )


def arriving(c: Call) -> Outputs:
    """Gradients of all outputs."""
    return Outputs(c.q, c.initial_k, c.initial_v)


def chunk_forward(dtype: torch.dtype, width: int, slots: int) -> None:
    chunk.forward(call_of(dtype, width, slots))


def chunk_backward(dtype: torch.dtype, width: int, slots: int) -> None:
    c = call_of(dtype, width, slots)
    chunk.backward(c, arriving(c), ALL, NOTHING_KEPT)


def chunk_backward_without_gates(dtype: torch.dtype, width: int, slots: int) -> None:
    c = call_of(dtype, width, slots)._replace(g=None)
    chunk.backward(c, arriving(c), ALL._replace(g=False), NOTHING_KEPT)


def recurrent_forward(dtype: torch.dtype, width: int, slots: int) -> None:
    fused_recurrent.forward(call_of(dtype, width, slots))


def recurrent_backward(dtype: torch.dtype, width: int, slots: int) -> None:
    c = call_of(dtype, width, slots)
    fused_recurrent.backward(c, arriving(c), ALL)


def recurrent_backward_to_values(dtype: torch.dtype, width: int, slots: int) -> None:
    c = call_of(dtype, width, slots)
    fused_recurrent.backward(c, arriving(c), Need(False, False, True, False, False, False, True))


def step(dtype: torch.dtype, width: int, slots: int) -> None:
    c = call_of(dtype, width, slots)
    q, k, v, s, g = (x[:, 0].contiguous() for x in c[:5])
    decoding.step(Step(q, k, v, s, g, c.initial_k, c.initial_v, slots=torch.zeros(2, dtype=torch.int64)))


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
