"""attn: which implementation runs where.

The gradient is the forward operator's, which also returns what the gradient keeps; `parallel_attn` is its first output.
"""

from __future__ import annotations

from typing import Any

from fla_ops.attn import call
from fla_ops.meta import attn as fake

from ._op import register, register_backward, register_composite


def _pairs(time: int, window_size: int | None) -> int:
    """Visible (row, key) pairs of one sequence."""
    window = time if window_size is None else min(window_size, time)
    return time * window - window * (window - 1) // 2


def _visible(c: Any) -> int:
    """Visible pairs over all query heads; packed sequences, whose lengths are not seen here, count as equally long."""
    batch, time, heads, _ = c.q
    sequences = 1 if c.cu_seqlens is None else c.cu_seqlens[0] - 1
    return int(batch * heads * sequences * _pairs(time // sequences, c.window_size))


def _forward_flops(c: Any) -> int:
    """Scores and their product with v, over the pairs that the window shows."""
    return int(_visible(c) * 2 * (c.q[3] + c.v[3]))


def _backward_flops(c: Any, *_: Any) -> int:
    """Scores, dq and dk over K; the scores' gradient and dv over V."""
    return int(_visible(c) * 2 * (3 * c.q[3] + 2 * c.v[3]))


def _prefill_visible(c: Any) -> int:
    """The same where rows lie later than most of their columns."""
    batch, time, heads, _ = c.q
    sequences = 1 if c.cu_seqlens is None else c.cu_seqlens[0] - 1
    rows, columns = time // sequences, c.k[1] // sequences
    window = rows + columns + (c.gap or 0) if c.window_size is None else c.window_size
    if c.gap is None:
        early = max(columns - rows, 0)
        pairs = _pairs(early + rows, window) - _pairs(early, window)
    else:  # row i sees the columns after columns + gap + i - window
        pairs = sum(min(max(window - c.gap - 1 - i, 0), columns) for i in range(rows))
    return int(batch * heads * sequences * pairs)


def _prefill_flops(c: Any) -> int:
    """Scores and their product with v, over the visible pairs."""
    return int(_prefill_visible(c) * 2 * (c.q[3] + c.v[3]))


def _prefill_backward_flops(c: Any, *_: Any) -> int:
    """Scores, dq and dk over K; the scores' gradient and dv over V."""
    return int(_prefill_visible(c) * 2 * (3 * c.q[3] + 2 * c.v[3]))


def _decoding_flops(c: Any) -> int:
    """Scores and their product with v, over the keys that the window shows; caches count as equally long."""
    _, sequences, heads, width = c.q
    keys = c.k[1] if c.window_size is None else min(c.k[1], sequences * c.window_size)
    return int(heads * keys * 2 * (width + c.v[3]))


register(
    call.FORWARD,
    cpu="fla_ops.attn.cpu.aten:forward",
    cuda="fla_ops.attn.gpu.parallel:forward",
    fake=fake.forward,
    gradient=call.GRADIENT,
    flops=_forward_flops,
    inline={"cpu": "fla_ops.attn.cpu.traced:forward"},
)
register_backward(
    call.GRADIENT,
    cpu="fla_ops.attn.cpu.aten:backward",
    cuda="fla_ops.attn.gpu.parallel_backward:backward",
    flops=_backward_flops,
    inline={"cpu": "fla_ops.attn.cpu.traced:backward"},
)
register(
    call.PREFILL_FORWARD,
    cpu="fla_ops.attn.cpu.aten:prefill",
    cuda="fla_ops.attn.gpu.parallel:prefill",
    fake=fake.prefill,
    gradient=call.PREFILL_GRADIENT,
    flops=_prefill_flops,
    inline={"cpu": "fla_ops.attn.cpu.traced:forward"},
)
register_backward(
    call.PREFILL_GRADIENT,
    cpu="fla_ops.attn.cpu.aten:backward",
    cuda="fla_ops.attn.gpu.parallel_backward:backward",
    flops=_prefill_backward_flops,
    inline={"cpu": "fla_ops.attn.cpu.traced:backward"},
)
register(
    call.DECODING,
    cpu="fla_ops.attn.cpu.cpp:one_step",
    cuda="fla_ops.attn.gpu.decoding:one_step",
    fake=fake.decoding,
    flops=_decoding_flops,
    inline={"cpu": "fla_ops.attn.cpu.traced:one_step"},
    tags=(),
)
register_composite(call.PARALLEL, "fla_ops.attn.forms:parallel")
register_composite(call.PREFILL, "fla_ops.attn.forms:prefill")
register_composite(call.DISPATCHER, "fla_ops.attn.forms:dispatch")
