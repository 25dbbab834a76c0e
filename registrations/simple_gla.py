"""simple_gla: which implementation runs where.

The backward forms recompute what they need from the inputs, so a gradient keeps nothing but those.
"""

from __future__ import annotations

from typing import Any

from fla_ops.meta import simple_gla as fake
from fla_ops.simple_gla import call

from ._op import register, register_backward, register_composite

CHUNK = 64  # steps in a chunk, for the FLOP formulas


def _steps(c: Any) -> int:
    """Steps over all value heads."""
    return int(c.q[0] * c.q[1] * c.v[2])


def _chunk_flops(c: Any) -> int:
    """Scores and their product with v inside a chunk; the state's update and its read-out across chunks."""
    key, value = c.q[3], c.v[3]
    return int(_steps(c) * (2 * CHUNK * (key + value) + 4 * key * value))


def _chunk_backward_flops(c: Any, *_: Any) -> int:
    key, value = c.q[3], c.v[3]
    return int(_steps(c) * (CHUNK * (6 * key + 4 * value) + 10 * key * value))


def _recurrent_flops(c: Any) -> int:
    """Decay, outer product and read-out of the state at each step."""
    return int(_steps(c) * 5 * c.q[3] * c.v[3])


def _recurrent_backward_flops(c: Any, *_: Any) -> int:
    return 3 * _recurrent_flops(c)


def _parallel_flops(c: Any) -> int:
    """The lower triangle of two T x T products."""
    return int(_steps(c) * c.q[1] * (c.q[3] + c.v[3]))


def _parallel_backward_flops(c: Any, *_: Any) -> int:
    return int(_steps(c) * c.q[1] * (3 * c.q[3] + 2 * c.v[3]))


def _step_flops(c: Any) -> int:
    sequences, heads, value = c.v
    return int(sequences * heads * 5 * c.q[2] * value)


def _record_flops(c: Any) -> int:
    """The state's update in each chunk, and the outputs of the chunk form where there are queries."""
    batch, time, heads, value = c.v
    return int(batch * time * heads * 2 * c.k[3] * value) if c.q is None else _chunk_flops(c)


def _advance_flops(c: Any) -> int:
    """Decay and outer product at each step, if all are taken."""
    sequences, time, heads, value = c.v
    return int(sequences * time * heads * 3 * c.k[3] * value)


for signature, gradient, form in (
    (call.CHUNK, call.CHUNK_GRADIENT, "chunk"),
    (call.FUSED_CHUNK, call.FUSED_CHUNK_GRADIENT, "fused_chunk"),
):
    register(
        signature,
        cpu=f"fla_ops.simple_gla.cpu.cpp:{form}_forward",
        cuda=f"fla_ops.simple_gla.gpu.{form}:forward",
        fake=fake.forward,
        gradient=gradient,
        flops=_chunk_flops,
        inline={"cpu": "fla_ops.simple_gla.cpu.aten:forward", "cuda": f"fla_ops.simple_gla.gpu.{form}:forward"},
    )
    register_backward(
        gradient,
        cpu=f"fla_ops.simple_gla.cpu.cpp:{form}_backward",
        cuda=f"fla_ops.simple_gla.gpu.{form}:backward",
        flops=_chunk_backward_flops,
        inline={"cpu": "fla_ops.simple_gla.cpu.aten:backward", "cuda": f"fla_ops.simple_gla.gpu.{form}:backward"},
    )
register(
    call.RECURRENT,
    cpu="fla_ops.simple_gla.cpu.cpp_recurrent:forward",
    cuda="fla_ops.simple_gla.gpu.fused_recurrent:forward",
    fake=fake.forward,
    gradient=call.RECURRENT_GRADIENT,
    flops=_recurrent_flops,
    inline={"cpu": "fla_ops.simple_gla.cpu.aten:forward"},
)
register_backward(
    call.RECURRENT_GRADIENT,
    cpu="fla_ops.simple_gla.cpu.cpp_recurrent:backward",
    cuda="fla_ops.simple_gla.gpu.fused_recurrent:backward",
    flops=_recurrent_backward_flops,
    inline={"cpu": "fla_ops.simple_gla.cpu.aten:backward"},
)
register(
    call.PARALLEL,
    cpu="fla_ops.simple_gla.cpu.aten:parallel_forward",
    cuda="fla_ops.simple_gla.gpu.parallel:forward",
    fake=fake.parallel_forward,
    gradient=call.PARALLEL_GRADIENT,
    flops=_parallel_flops,
    inline={"cpu": "fla_ops.simple_gla.cpu.aten:parallel_forward"},
)
register_backward(
    call.PARALLEL_GRADIENT,
    cpu="fla_ops.simple_gla.cpu.aten:parallel_backward",
    cuda="fla_ops.simple_gla.gpu.parallel:backward",
    flops=_parallel_backward_flops,
    inline={"cpu": "fla_ops.simple_gla.cpu.aten:parallel_backward"},
)
register(
    call.STEP,
    cpu="fla_ops.simple_gla.cpu.cpp_recurrent:step",
    cuda="fla_ops.simple_gla.gpu.decoding:step",
    fake=fake.step,
    flops=_step_flops,
    inline={"cpu": "fla_ops.simple_gla.cpu.aten:step"},
    tags=(),
)
register(
    call.RECORD,
    cpu="fla_ops.simple_gla.cpu.cpp:record",
    cuda="fla_ops.simple_gla.gpu.chunk:record",
    fake=fake.record,
    flops=_record_flops,
    inline={"cpu": "fla_ops.simple_gla.cpu.aten:record"},
)
register(
    call.ADVANCE,
    cpu="fla_ops.simple_gla.cpu.cpp_recurrent:advance",
    cuda="fla_ops.simple_gla.gpu.advance:advance",
    fake=fake.advance,
    flops=_advance_flops,
    inline={"cpu": "fla_ops.simple_gla.cpu.aten:advance"},
    tags=(),
)
register(
    call.PREFILL,
    cpu="fla_ops.simple_gla.cpu.cpp:prefill",
    cuda="fla_ops.simple_gla.gpu.chunk:prefill",
    fake=fake.prefill,
    flops=_chunk_flops,
    inline={"cpu": "fla_ops.simple_gla.cpu.aten:prefill"},
)
register_composite(call.DISPATCHER, "fla_ops.simple_gla.forms:dispatch")
