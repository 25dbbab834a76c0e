"""gsa: which implementation runs where.

`chunk_gsa` only composes: what its gradient keeps is an output of `chunk_gsa_forward`, so that selective checkpointing
can name it. `fused_recurrent_gsa` keeps nothing but its inputs.
"""

from __future__ import annotations

from typing import Any

from fla_ops.gsa import call
from fla_ops.meta import gsa as fake

from ._op import register, register_backward, register_composite

CHUNK = 64  # steps in a chunk, for the FLOP formulas


def _steps(c: Any) -> tuple[int, int, int, int]:
    """Steps over the query heads and over the state heads, memory slots, and both widths together."""
    batch, time, query_heads, key_width = c.q
    return batch * time * query_heads, batch * time * c.v[2], c.s[3], key_width + c.v[3]


def _chunk_flops(c: Any) -> int:
    """Products of queries and keys, slots and values inside a chunk, at each level of halves; states across chunks."""
    reading, writing, slots, widths = _steps(c)
    inside = CHUNK * (widths + 4 * slots)
    return reading * (inside + 2 * slots * widths) + writing * 2 * slots * widths


def _chunk_backward_flops(c: Any, *_: Any) -> int:
    return 3 * _chunk_flops(c)


def _recurrent_flops(c: Any) -> int:
    """Decay and outer product of both states at each step; a read-out of both for each query head."""
    reading, writing, slots, widths = _steps(c)
    return (2 * reading + 3 * writing) * slots * widths


def _recurrent_backward_flops(c: Any, *_: Any) -> int:
    return 3 * _recurrent_flops(c)


def _step_flops(c: Any) -> int:
    return int((2 * c.q[0] * c.q[1] + 3 * c.v[0] * c.v[1]) * c.s[2] * (c.q[2] + c.v[2]))


def _advance_flops(c: Any) -> int:
    """Decay and outer product of both states at each step, if all are taken."""
    sequences, time, heads, value = c.v
    return int(sequences * time * heads * 3 * c.s[3] * (c.k[3] + value))


def _record_flops(c: Any) -> int:
    """Those of the chunk form, whose queries are the keys where there are none."""
    batch, time, heads, key_width = c.k
    query_heads = heads if c.q is None else c.q[2]
    reading, writing, slots, widths = batch * time * query_heads, batch * time * heads, c.s[3], key_width + c.v[3]
    return int(reading * (CHUNK * (widths + 4 * slots) + 2 * slots * widths) + writing * 2 * slots * widths)


register(
    call.CHUNK_FORWARD,
    cpu="fla_ops.gsa.cpu.cpp:chunk_forward",
    cuda="fla_ops.gsa.gpu.chunk:forward",
    fake=fake.chunk_forward,
    gradient=call.CHUNK_GRADIENT,
    flops=_chunk_flops,
    inline={"cpu": "fla_ops.gsa.cpu.traced:chunk_forward"},
)
register_backward(
    call.CHUNK_GRADIENT,
    cpu="fla_ops.gsa.cpu.cpp:chunk_backward",
    cuda="fla_ops.gsa.gpu.chunk:backward",
    flops=_chunk_backward_flops,
    inline={"cpu": "fla_ops.gsa.cpu.traced:chunk_backward"},
)
register(
    call.RECURRENT,
    cpu="fla_ops.gsa.cpu.cpp_recurrent:forward",
    cuda="fla_ops.gsa.gpu.fused_recurrent:forward",
    fake=fake.recurrent_forward,
    gradient=call.RECURRENT_GRADIENT,
    flops=_recurrent_flops,
    inline={"cpu": "fla_ops.gsa.cpu.traced:forward"},
)
register_backward(
    call.RECURRENT_GRADIENT,
    cpu="fla_ops.gsa.cpu.cpp:recurrent_backward",
    cuda="fla_ops.gsa.gpu.fused_recurrent:backward",
    flops=_recurrent_backward_flops,
    inline={"cpu": "fla_ops.gsa.cpu.traced:backward"},
)
register(
    call.STEP,
    cpu="fla_ops.gsa.cpu.cpp_recurrent:step",
    cuda="fla_ops.gsa.gpu.decoding:step",
    fake=fake.step,
    flops=_step_flops,
    inline={"cpu": "fla_ops.gsa.cpu.traced_pools:step"},
    tags=(),
)
for signature, name, shapes, flops in (
    (call.PREFILL, "prefill", fake.prefill, _chunk_flops),
    (call.ADVANCE, "advance", fake.advance, _advance_flops),
):
    body = f"fla_ops.gsa.compose:{name}"
    traced = f"fla_ops.gsa.cpu.traced_pools:{name}"
    register(signature, cpu=body, cuda=body, fake=shapes, flops=flops, inline={"cpu": traced}, tags=())
register(
    call.RECORD,
    cpu="fla_ops.gsa.stopping:record",
    cuda="fla_ops.gsa.stopping:record",
    fake=fake.record,
    flops=_record_flops,
    inline={"cpu": "fla_ops.gsa.cpu.traced:record"},
)
register_composite(call.CHUNK, "fla_ops.gsa.forms:chunk")
register_composite(call.DISPATCHER, "fla_ops.gsa.forms:dispatch")
