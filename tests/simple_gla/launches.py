"""The launches of simple_gla's kernels that take the most registers and shared memory, for each of its kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fla_ops.simple_gla.call import Advance, Call, Need, Outputs, Prefill, Record, Step, Weighted, WeightsNeed
from fla_ops.simple_gla.gpu import advance, chunk, decoding, fused_chunk, fused_recurrent, parallel

SIZES = {"batch": 2, "time": 128, "key_heads": 2, "heads": 4}  # widths decide, and whether a size divides by 16
CHUNK = 256  # an entry's tile is never cut by it
ALL = Need(q=True, k=True, v=True, g=True, g_gamma=False, initial_state=True)


def call(dtype: torch.dtype, key_width: int, value_width: int) -> Call:
    """Arguments of one call, on the host."""
    batch, time, key_heads, heads = SIZES.values()
    return Call(
        q=torch.zeros(batch, time, key_heads, key_width, dtype=dtype),
        k=torch.zeros(batch, time, key_heads, key_width, dtype=dtype),
        v=torch.zeros(batch, time, heads, value_width, dtype=dtype),
        g=torch.zeros(batch, time, heads),
        initial_state=torch.zeros(batch, heads, key_width, value_width),
        output_final_state=True,
        chunk_size=CHUNK,
    )


def arriving(c: Call) -> Outputs:
    """The outputs' gradients."""
    return Outputs(c.v, c.initial_state)


def chunk_forward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    chunk.forward(call(dtype, key_width, value_width))


def chunk_backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    chunk.backward(c, arriving(c), ALL)


def fused_chunk_forward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    fused_chunk.forward(call(dtype, key_width, value_width))


def fused_chunk_backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    fused_chunk.backward(c, arriving(c), ALL._replace(g=False))


def fused_recurrent_backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    fused_recurrent.backward(c, arriving(c), ALL)


def parallel_backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    parallel.backward(c, Weighted(c.v, None), WeightsNeed(*ALL[:5]))


def parallel_forward_with_attentions(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    parallel.forward(call(dtype, key_width, value_width)._replace(output_attentions=True))


def prefill(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    slots, fresh = (torch.zeros(len(c.q), dtype=kind) for kind in (torch.int64, torch.bool))
    chunk.prefill(Prefill(c.q, c.k, c.v, c.initial_state, c.g, slots=slots, fresh=fresh, chunk_size=CHUNK))


def record(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    chunk.record(Record(c.k, c.v, c.g, initial_state=c.initial_state, q=c.q))


def advance_pool(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    accepted, slots = (torch.zeros(len(c.q), dtype=torch.int64) for _ in range(2))
    advance.advance(Advance(c.k, c.v, c.initial_state, accepted, c.g, slots=slots))


def step(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    q, k, v, g = (x[:, 0].contiguous() for x in (c.q, c.k, c.v, c.g))
    decoding.step(Step(q, k, v, c.initial_state, g, slots=torch.tensor([0, 1])))


CALLS: dict[str, list[Callable[[torch.dtype, int, int], None]]] = {
    "chunk_state": [chunk_backward, prefill, record],
    "chunk_output": [chunk_forward, prefill],
    "chunk_backward": [chunk_backward],
    "fused_chunk": [fused_chunk_forward, fused_chunk_backward],
    "fused_recurrent": [fused_recurrent_backward],
    "parallel": [parallel_backward, parallel_forward_with_attentions],
    "decoding": [step, advance_pool],
    "gate_gradient": [parallel_backward],
    "windowed_gate_gradient": [fused_recurrent_backward],
    "group_sum": [chunk_backward],
}
