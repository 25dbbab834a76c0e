"""attn: schemas and gradients.

The forward operator also returns what the gradient keeps: the logarithm of each row's softmax denominator, with which
parts of one attention that were computed apart can be joined; and, if asked, what rounding half-precision outputs took
away. The gradient of the scores is a difference with do . o, and where a row attends to few keys little but that
rounding would be left of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_ops.meta import attn as fake

from ._op import register, register_composite

ACTIVATIONS = ("q", "k", "v")
CONTIGUOUS = (torch.Tag.needs_contiguous_strides,)


def _pairs(time: int, window_size: int | None) -> int:
    """Visible (row, key) pairs of one sequence."""
    window = time if window_size is None else min(window_size, time)
    return time * window - window * (window - 1) // 2


def _visible(q: Any, window_size: int | None, cu_seqlens: Any) -> int:
    """Visible pairs over all query heads; packed sequences, whose lengths are not seen here, count as equally long."""
    batch, time, heads, _ = q
    sequences = 1 if cu_seqlens is None else cu_seqlens[0] - 1
    return int(batch * heads * sequences * _pairs(time // sequences, window_size))


def _forward_flops(
    q: Any, k: Any, v: Any, g: Any = None, scale: Any = None, window_size: Any = None, cu_seqlens: Any = None,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Scores and their product with v, over the pairs that the window shows."""
    return int(_visible(q, window_size, cu_seqlens) * 2 * (q[3] + v[3]))


def _backward_flops(
    q: Any, k: Any, v: Any, g: Any, sink_bias: Any, cu_seqlens: Any, o: Any, lse: Any, rest: Any, do: Any, dlse: Any,
    scale: Any, window_size: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Scores, dq and dk over K; the scores' gradient and dv over V."""
    return int(_visible(q, window_size, cu_seqlens) * 2 * (3 * q[3] + 2 * v[3]))


def _decoding_flops(
    q: Any, k: Any, v: Any, g: Any, scale: Any, cu_seqlens: Any, do_gate_scale: Any = False,
    sink_bias: Any = None, window_size: Any = None, **_: Any,
) -> int:  # fmt: skip
    """Scores and their product with v, over the keys that the window shows; caches count as equally long."""
    sequences, heads = q[1], q[2]
    keys = k[1] if window_size is None else min(k[1], sequences * window_size)
    return int(heads * keys * 2 * (q[3] + v[3]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
    q, k, v, g, ctx.scale, ctx.window_size, cu_seqlens, _, sink_bias, _ = inputs
    ctx.save_for_backward(q, k, v, g, sink_bias, cu_seqlens, *output)
    if output[2] is not None:
        ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:
    if do is None and dlse is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    do = torch.zeros_like(saved[6]) if do is None else do
    mask = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 8)]
    dq, dk, dv, dg, dsink_bias = torch.ops.fla.parallel_attn_backward(
        *saved, do, dlse, ctx.scale, ctx.window_size, mask
    )
    return dq, dk, dv, dg, None, None, None, None, dsink_bias, None


register(
    "parallel_attn_forward(Tensor q, Tensor k, Tensor v, Tensor? g=None, float? scale=None, SymInt? window_size=None, "
    "Tensor? cu_seqlens=None, Tensor? chunk_indices=None, Tensor? sink_bias=None, bool output_rest=False) -> "
    "(Tensor o, Tensor lse, Tensor? rest)",
    cpu="fla_ops.attn.cpu.aten:forward",
    cuda="fla_ops.attn.gpu.parallel:forward",
    fake=fake.parallel_forward,
    setup_context=_keep,
    backward=_gradient,
    cast=ACTIVATIONS,
    flops=_forward_flops,
    tags=CONTIGUOUS,
)
register(
    "parallel_attn_backward(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? sink_bias, Tensor? cu_seqlens, Tensor o, "
    "Tensor lse, Tensor? rest, Tensor do, Tensor? dlse, float? scale, SymInt? window_size, bool[5] output_mask) -> "
    "(Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dg, Tensor? dsink_bias)",
    cpu="fla_ops.attn.cpu.aten:backward",
    cuda="fla_ops.attn.gpu.parallel_backward:backward",
    fake=fake.parallel_backward,
    flops=_backward_flops,
    tags=CONTIGUOUS,
)
register(
    "attn_decoding_one_step(Tensor q, Tensor k, Tensor v, Tensor? g, float? scale, Tensor cu_seqlens, "
    "bool do_gate_scale=False, Tensor? sink_bias=None, SymInt? window_size=None) -> Tensor",
    cpu="fla_ops.attn.cpu.aten_decoding:one_step",
    cuda="fla_ops.attn.gpu.decoding:one_step",
    fake=fake.decoding,
    cast=ACTIVATIONS,
    flops=_decoding_flops,
)
register_composite(
    "parallel_attn(Tensor q, Tensor k, Tensor v, Tensor? g=None, float? scale=None, SymInt? window_size=None, "
    "Tensor? cu_seqlens=None, Tensor? chunk_indices=None, Tensor? sink_bias=None) -> Tensor",
    "fla_ops.attn.forms:parallel",
)
register_composite(
    "attn(Tensor q, Tensor k, Tensor v, Tensor? g=None, float? scale=None, SymInt? window_size=None, "
    "Tensor? cu_seqlens=None, Tensor? chunk_indices=None, bool do_gate_scale=False, Tensor? sink_bias=None, "
    'str mode="auto") -> Tensor',
    "fla_ops.attn.forms:dispatch",
)
