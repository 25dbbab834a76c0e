"""simple_gla on a CPU: sequences of a dense batch go segment by segment with a carried state, so that what a segment
computes stays in the cache. The chunk form keeps the states of all chunks for its gradient, the fused form computes
them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import decay as decays
from fla_ops.common.cpu.chunks import DenseChunks, Factor, PackedChunks, runs

from .. import checks
from . import chunked

SEGMENT = 1 << 19  # numbers of one tensor in a segment


def chunk_forward(
    q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size
):
    """Dense: segment by segment. Packed: the chunks of all sequences at once."""
    checks.launch(q, k, v, g, g_gamma, initial_state, state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size)
    if cu_seqlens is None:
        return _forward(q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, None, chunk_size)
    layout = _packed(q, cu_seqlens, chunk_size)
    written = chunked.cut(layout, k, v, g, g_gamma)
    o, final = chunked.forward(layout, q, written, scale, initial_state, output_final_state, state_v_first)
    return layout.join(o, v.dtype), final


def chunk_backward(
    q, k, v, g, g_gamma, initial_state, cu_seqlens, do, dfinal_state, scale, state_v_first, chunk_size, output_mask
):
    """The gradient of chunk_forward; chunk states are computed again, once."""
    shared, options = (q, k, v, g, g_gamma, initial_state), (scale, state_v_first)
    if cu_seqlens is None:
        return _backward(*shared, None, do, dfinal_state, *options, chunk_size, output_mask, keep=True)
    layout = _packed(q, cu_seqlens, chunk_size)
    written, leave = chunked.cut(layout, k, v, g, g_gamma), chunked.joining(layout, q, k, v)
    states = (initial_state, do, dfinal_state)
    return chunked.backward(layout, q, written, g, g_gamma, *states, *options, output_mask, leave)


def fused_chunk_forward(
    q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size
):
    """One segment after the other, so that memory beyond the output does not grow with T."""
    checks.launch(q, k, v, g, g_gamma, initial_state, state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size)
    options = (scale, initial_state, output_final_state, state_v_first)
    return _forward(q, k, v, g, g_gamma, *options, cu_seqlens, chunk_size)


def fused_chunk_backward(
    q, k, v, g, g_gamma, initial_state, cu_seqlens, do, dfinal_state, scale, state_v_first, chunk_size, output_mask
):
    """The gradient of fused_chunk_forward: a forward walk for the segments' states, then a walk back."""
    shared, options = (q, k, v, g, g_gamma, initial_state), (scale, state_v_first)
    return _backward(*shared, cu_seqlens, do, dfinal_state, *options, chunk_size, output_mask, keep=False)


def _forward(q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, chunk_size):
    o, final = torch.empty_like(v, memory_format=torch.contiguous_format), []
    for sequence, start, end in runs(q, cu_seqlens):
        state = _state_of(initial_state, sequence, q, v, state_v_first)
        for a, b in _segments(v, start, end, chunk_size):
            layout, written = _cut(k, v, g, g_gamma, a, b, chunk_size)
            outputs, state = chunked.forward(layout, q[:, a:b], written, scale, state, True, False)
            layout.write(outputs, o[:, a:b])
        final.append(state)
    if not output_final_state:
        return o, None
    return o, chunked.leave_state(torch.cat(final).unflatten(1, (q.shape[2], -1)), state_v_first)


def _backward(
    q,
    k,
    v,
    g,
    g_gamma,
    initial_state,
    cu_seqlens,
    do,
    dfinal,
    scale,
    state_v_first,
    chunk_size,
    output_mask,
    keep,
):
    """A walk forwards for the states, of every chunk or (keep=False) only before each segment, then a walk back."""
    need_state, mask = output_mask[5], [*output_mask[:5], True]
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
        for wanted, x in zip(output_mask[:4], (q, k, v, g), strict=True)
    ]
    dgamma = None
    dinitial = []
    for sequence, start, end in runs(q, cu_seqlens):
        state = _state_of(initial_state, sequence, q, v, state_v_first)
        dstate = _state_of(dfinal, sequence, q, v, state_v_first)
        segments = []
        for a, b in _segments(v, start, end, chunk_size):
            before, held = state, None
            if keep or b < end:
                layout, written = _cut(k, v, g, g_gamma, a, b, chunk_size)
                kept, state = chunked.chunk_states(layout, written, before)
                held = (layout, written, kept) if keep else None
            segments.append((a, b, before, held))
        while segments:
            a, b, before, held = segments.pop()
            layout, written, kept = held or (*_cut(k, v, g, g_gamma, a, b, chunk_size), None)

            def leave(i: int, part: Tensor, factor: Factor, layout=layout, a=a, b=b) -> Tensor:
                layout.write(part, grads[i][:, a:b], factor)
                return grads[i]

            gates = (None if g is None else g[:, a:b], g_gamma)
            _, _, _, dg, gamma, dstate = chunked.backward(
                layout, q[:, a:b], written, *gates, before, do[:, a:b], dstate, scale, False, mask, leave, kept
            )
            if dg is not None:
                grads[3][:, a:b] = dg
            if gamma is not None:
                dgamma = gamma if dgamma is None else dgamma + gamma
        dinitial.append(dstate)
    if output_mask[4] and dgamma is None:
        dgamma = torch.zeros_like(g_gamma)
    if not need_state:
        return *grads, dgamma, None
    dinitial_state = chunked.leave_state(torch.cat(dinitial).unflatten(1, (q.shape[2], -1)), state_v_first)
    return *grads, dgamma, dinitial_state.to(initial_state.dtype)


def _packed(q: Tensor, cu_seqlens: Tensor, chunk_size: int) -> PackedChunks:
    return PackedChunks(valid.cu_seqlens_values(cu_seqlens, q.shape[1]), chunk_size, q.device)


def _cut(
    k: Tensor, v: Tensor, g: Tensor | None, g_gamma: Tensor | None, start: int, end: int, chunk_size: int
) -> tuple[DenseChunks, chunked.Written]:
    """A segment in chunks: smaller ones for few steps, and where decays only then are mild enough to be split."""
    k, v, g = (None if x is None else x[:, start:end] for x in (k, v, g))
    chunk_size = min(chunk_size, max(16, 1 << (k.shape[1] - 1).bit_length()))
    if g is not None and k.shape[2] == v.shape[2]:
        chunk_size = decays.chunk_size(g, chunk_size)
    layout = DenseChunks(k.shape[0], k.shape[1], chunk_size)
    return layout, chunked.cut(layout, k, v, g, g_gamma)


def _segments(v: Tensor, start: int, end: int, chunk_size: int) -> list[tuple[int, int]]:
    """Whole chunks of all sequences and heads, as many as keep a tensor in the cache."""
    batch, _, heads, width = v.shape
    size = chunk_size * max(1, SEGMENT // max(1, batch * heads * chunk_size * width))
    return [(a, min(a + size, end)) for a in range(start, end, size)]


def _state_of(state: Tensor | None, sequence: slice, q: Tensor, v: Tensor, state_v_first: bool) -> Tensor:
    """The states of some sequences as [n, H, K, V] in the carried dtype; zeros where there is none."""
    dtype = chunked.compute_dtype(v)
    if state is None:
        return v.new_zeros((sequence.stop - sequence.start, v.shape[2], q.shape[3], v.shape[3]), dtype=dtype)
    state = state[sequence].to(dtype)
    return state.mT if state_v_first else state
