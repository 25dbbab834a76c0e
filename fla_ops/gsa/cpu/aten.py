"""gsa on a CPU: the chunk form, all chunks at once in batched products."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu.chunks import Chunks, DenseChunks, PackedChunks

from .. import checks
from . import abc, chunked
from .chunked import Gradients, Inputs


def chunk_forward(
    q, k, v, s, g, scale, initial_k, initial_v, output_final_state, cu_seqlens, cu_seqlens_cpu, chunk_size,
    checkpoint_level,
):  # fmt: skip
    """o, the final states, and what the gradient keeps: `earlier` and `own` up to level 1, the chunks' states at level
    0.
    """
    checks.launch(q, k, v, s, g, initial_k, initial_v, cu_seqlens, cu_seqlens_cpu, chunk_size, checkpoint_level)
    layout = _layout(q, cu_seqlens, chunk_size)
    c = chunked.cut(layout, q, k, v, *abc.gates(s, g, cu_seqlens), scale)
    o, earlier, own, states_k, states_v, final_k, final_v = chunked.forward(c, initial_k, initial_v)
    rows = checks.chunk_rows(q, cu_seqlens, chunk_size)
    return (
        chunked.join_group(layout, o, v.dtype),
        final_k if output_final_state else None,
        final_v if output_final_state else None,
        chunked.join_group(layout, earlier, c.dtype) if checkpoint_level < 2 else None,
        layout.join(own, c.dtype).flatten(2) if checkpoint_level < 2 else None,
        _filled(states_k, rows) if checkpoint_level < 1 else None,
        _filled(states_v, rows) if checkpoint_level < 1 else None,
    )


def chunk_backward(
    q, k, v, s, g, initial_k, initial_v, cu_seqlens, earlier, own, states_k, states_v, do, dfinal_k, dfinal_v, scale,
    chunk_size, output_mask,
):  # fmt: skip
    """The gradient of chunk_forward; what it did not keep is computed again."""
    layout, heads = _layout(q, cu_seqlens, chunk_size), k.shape[2]
    weights, gates = abc.gates(s, g, cu_seqlens)
    wanted = checks.mask(g, output_mask)
    c = chunked.cut(layout, q, k, v, weights, gates, scale)
    if states_k is None:
        states_k, _ = chunked.key_states(c, initial_k)
        states_v, _ = chunked.value_states(c, initial_v)
    else:
        states_k, states_v = (_taken(states, layout) for states in (states_k, states_v))
    if earlier is not None:
        earlier = chunked.split_group(layout, earlier, heads, c.dtype)
    do = chunked.split_group(layout, do, heads, c.dtype)
    found = chunked.backward(c, earlier, states_k, states_v, do, dfinal_k, dfinal_v, chunked.scale_of(q, scale), wanted)
    inputs = (q, k, v, weights, gates, initial_k, initial_v)
    dq, dk, dv, ds, dg, dinitial_k, dinitial_v = _leave(c, found, inputs, wanted)
    if g is None:
        ds, dg = abc.gradient(s, weights, gates, cu_seqlens, ds, dg), None
    return dq, dk, dv, ds, dg, dinitial_k, dinitial_v


def _leave(c: Inputs, found: Gradients, inputs: tuple[Tensor | None, ...], output_mask: list[bool]) -> Gradients:
    """Gradients in the layout and dtype of their inputs, None for those not asked for."""
    dq, *steps = found[:5]
    left = [None if dq is None else chunked.join_group(c.layout, dq, inputs[0].dtype)]
    left += [
        None if gradient is None else c.layout.join(gradient, x.dtype)
        for gradient, x in zip(steps, inputs[1:5], strict=True)
    ]
    left += [
        gradient.to(x.dtype) if wanted else None
        for gradient, x, wanted in zip(found[5:], inputs[5:], output_mask[5:], strict=True)
    ]
    return tuple(left)


def _layout(q: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Chunks:
    steps = checks.chunk_steps(q, chunk_size)
    if cu_seqlens is None:
        return DenseChunks(q.shape[0], q.shape[1], steps)
    return PackedChunks(valid.cu_seqlens_values(cu_seqlens, q.shape[1]), steps, q.device)


def _filled(states: Tensor, rows: int) -> Tensor:
    """[rows, lanes, ...] as one dimension, with zeros where fewer rows are used than there may be."""
    states = states.flatten(0, 1)
    if len(states) == rows:
        return states
    return torch.cat([states, states.new_zeros(rows - len(states), *states.shape[1:])])


def _taken(states: Tensor, layout: Chunks) -> Tensor:
    """The inverse of _filled."""
    return states[: layout.rows * layout.lanes].unflatten(0, (layout.rows, layout.lanes))
