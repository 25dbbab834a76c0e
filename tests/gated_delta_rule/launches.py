"""The launches of the gated delta rule's kernels that take the most registers and shared memory, for each kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fla_ops.gated_delta_rule.call import Call, Need, Outputs, Step
from fla_ops.gated_delta_rule.gpu import chunk, decoding, fused_recurrent

SIZES = {"batch": 2, "time": 128, "key_heads": 2, "heads": 4}  # widths decide, and whether a size divides by 16


def call(dtype: torch.dtype, key_width: int, value_width: int) -> Call:
    """Arguments of one call, on the host."""
    batch, time, key_heads, heads = SIZES.values()
    return Call(
        q=torch.zeros(batch, time, key_heads, key_width, dtype=dtype),
        k=torch.zeros(batch, time, key_heads, key_width, dtype=dtype),
        v=torch.zeros(batch, time, heads, value_width, dtype=dtype),
        g=torch.zeros(batch, time, heads),
        beta=torch.zeros(batch, time, heads),
        initial_state=torch.zeros(batch, heads, key_width, value_width),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


def chunk_forward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    chunk.forward(call(dtype, key_width, value_width))


def chunk_backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    chunk.backward(c, Outputs(c.v, c.initial_state), Need(*[True] * 6))


def recurrent_forward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    fused_recurrent.forward(call(dtype, key_width, value_width))


def step(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    q, k, v, g, beta = (x[:, 0].contiguous() for x in (c.q, c.k, c.v, c.g, c.beta))
    slots = torch.arange(len(q))
    decoding.step(Step(q, k, v, c.initial_state, g, beta, slots=slots, use_qk_l2norm_in_kernel=True))


CALLS: dict[str, list[Callable[[torch.dtype, int, int], None]]] = {
    "delta_inverse": [chunk_forward, chunk_backward],
    "delta_score_gradient": [chunk_backward],
    "delta_state": [chunk_forward, chunk_backward],
    "delta_output": [chunk_forward],
    "delta_state_gradient": [chunk_backward],
    "delta_gradient": [chunk_backward],
    "delta_normalization": [chunk_backward],
    "delta_recurrent": [recurrent_forward],
    "delta_decoding": [step],
}
