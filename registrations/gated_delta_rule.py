"""The gated delta rule: which implementation runs where.

The backward forms recompute what they need from the inputs, so a gradient keeps nothing but those.
"""

from __future__ import annotations

from typing import Any

from fla_ops.gated_delta_rule import call
from fla_ops.meta import gated_delta_rule as fake

from ._op import register, register_backward, register_composite

CHUNK = 64  # steps in a chunk, for the FLOP formulas


def _steps(c: Any) -> int:
    """Steps over all value heads."""
    return int(c.q[0] * c.q[1] * c.v[2])


def _chunk_flops(c: Any) -> int:
    """Lower triangles: scores of queries and of keys, the changes that solve the system, the scores' product with them;
    across chunks: what keys and queries read of the state, and its update.
    """
    key, value = c.q[3], c.v[3]
    return int(_steps(c) * (2 * CHUNK * (key + value) + 6 * key * value))


def _chunk_backward_flops(c: Any, *_: Any) -> int:
    """Forward without outputs, then ten lower triangles and six products across chunks."""
    key, value = c.q[3], c.v[3]
    return int(_steps(c) * (CHUNK * (7 * key + 5 * value) + 16 * key * value))


def _recurrent_flops(c: Any) -> int:
    """Decay, what the key reads, outer product and read-out of the state at each step."""
    return int(_steps(c) * 7 * c.q[3] * c.v[3])


def _step_flops(c: Any) -> int:
    sequences, heads, value = c.v
    return int(sequences * heads * 7 * c.q[2] * value)


ATEN, CPP = "fla_ops.gated_delta_rule.cpu.aten", "fla_ops.gated_delta_rule.cpu.cpp"
GPU = "fla_ops.gated_delta_rule.gpu"
for signature, gradient, module, cuda, flops in (
    (call.CHUNK, call.CHUNK_GRADIENT, CPP, f"{GPU}.chunk", _chunk_flops),
    (call.RECURRENT, call.RECURRENT_GRADIENT, f"{CPP}_recurrent", f"{GPU}.fused_recurrent", _recurrent_flops),
):
    register(
        signature,
        cpu=f"{module}:forward",
        cuda=f"{cuda}:forward",
        fake=fake.forward,
        gradient=gradient,
        flops=flops,
        inline=dict.fromkeys(("cpu", "cuda"), f"{ATEN}:forward"),
    )
    register_backward(
        gradient,
        cpu=f"{CPP}:backward",
        cuda=f"{GPU}.chunk:backward",
        flops=_chunk_backward_flops,
        inline=dict.fromkeys(("cpu", "cuda"), f"{ATEN}:backward"),
    )
register(
    call.STEP,
    cpu=f"{CPP}_recurrent:step",
    cuda=f"{GPU}.decoding:step",
    fake=fake.step,
    flops=_step_flops,
    inline=dict.fromkeys(("cpu", "cuda"), f"{ATEN}:step"),
    tags=(),
)
register_composite(call.DISPATCHER, "fla_ops.gated_delta_rule.forms:dispatch")
