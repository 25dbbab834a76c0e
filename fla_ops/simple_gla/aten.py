"""simple_gla on a CPU: the chunk form, and the fused form that runs it segment by segment with a carried state."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.chunks import Chunks, DenseChunks, PackedChunks, runs

from . import checks, chunked

SEGMENT = 8  # chunks in one segment of the fused form: what it reads again is still in the cache


def chunk_forward(
    q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size
):
    """All chunks at once: every product is one batched call; chunk states are kept."""
    checks.launch(q, k, v, g, g_gamma, initial_state, state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size)
    layout = _layout(q, cu_seqlens, chunk_size)
    return chunked.forward(layout, q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first)


def chunk_backward(
    q, k, v, g, g_gamma, initial_state, cu_seqlens, do, dfinal_state, scale, state_v_first, chunk_size, output_mask
):
    """The gradient of chunk_forward; chunk states are computed again."""
    layout = _layout(q, cu_seqlens, chunk_size)
    return chunked.backward(
        layout, q, k, v, g, g_gamma, initial_state, do, dfinal_state, scale, state_v_first, output_mask
    )


def fused_chunk_forward(
    q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size
):
    """One segment after the other, so that memory beyond the output does not grow with T."""
    checks.launch(q, k, v, g, g_gamma, initial_state, state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size)
    o, final = torch.empty_like(v, memory_format=torch.contiguous_format), []
    for sequence, start, end in runs(q, cu_seqlens):
        state = _state_of(initial_state, sequence, q, v, state_v_first)
        for a, b in _segments(start, end, chunk_size):
            piece = [None if x is None else x[:, a:b] for x in (q, k, v, g)]
            o[:, a:b], state = chunked.forward(_dense(piece[0], chunk_size), *piece, g_gamma, scale, state, True, False)
        final.append(state)
    if not output_final_state:
        return o, None
    return o, chunked.leave_state(torch.cat(final).unflatten(1, (q.shape[2], -1)), state_v_first)


def fused_chunk_backward(
    q, k, v, g, g_gamma, initial_state, cu_seqlens, do, dfinal_state, scale, state_v_first, chunk_size, output_mask
):
    """The gradient of fused_chunk_forward: a forward walk for the segments' states, then a walk back."""
    need_state, mask = output_mask[5], [*output_mask[:5], True]
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
        for wanted, x in zip(output_mask[:4], (q, k, v, g), strict=True)
    ]
    dgamma = None
    dinitial = []
    for sequence, start, end in runs(q, cu_seqlens):
        dstate = _state_of(dfinal_state, sequence, q, v, state_v_first)
        states = [_state_of(initial_state, sequence, q, v, state_v_first)]
        segments = list(_segments(start, end, chunk_size))
        for a, b in segments[:-1]:
            piece = [None if x is None else x[:, a:b] for x in (k, v, g)]
            states.append(chunked.final_state(_dense(piece[0], chunk_size), *piece, g_gamma, states[-1]))
        for (a, b), state in zip(reversed(segments), reversed(states), strict=False):
            piece = [None if x is None else x[:, a:b] for x in (q, k, v, g)]
            layout = _dense(piece[0], chunk_size)
            *found, gamma, dstate = chunked.backward(
                layout, *piece, g_gamma, state, do[:, a:b], dstate, scale, False, mask
            )
            for whole, part in zip(grads, found, strict=True):
                if whole is not None:
                    whole[:, a:b] = part
            if gamma is not None:
                dgamma = gamma if dgamma is None else dgamma + gamma
        dinitial.append(dstate)
    if output_mask[4] and dgamma is None:
        dgamma = torch.zeros_like(g_gamma)
    if not need_state:
        return *grads, dgamma, None
    dinitial_state = chunked.leave_state(torch.cat(dinitial).unflatten(1, (q.shape[2], -1)), state_v_first)
    return *grads, dgamma, dinitial_state.to(initial_state.dtype)


def _layout(q: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Chunks:
    if cu_seqlens is None:
        return _dense(q, chunk_size)
    return PackedChunks(valid.cu_seqlens_values(cu_seqlens, q.shape[1]), chunk_size, q.device)


def _dense(x: Tensor, chunk_size: int) -> DenseChunks:
    return DenseChunks(x.shape[0], x.shape[1], chunk_size)


def _segments(start: int, end: int, chunk_size: int) -> list[tuple[int, int]]:
    size = SEGMENT * chunk_size
    return [(a, min(a + size, end)) for a in range(start, end, size)]


def _state_of(state: Tensor | None, sequence: slice, q: Tensor, v: Tensor, state_v_first: bool) -> Tensor:
    """The states of some sequences as [n, H, K, V] in the carried dtype; zeros where there is none."""
    dtype = chunked.compute_dtype(v)
    if state is None:
        return v.new_zeros((sequence.stop - sequence.start, v.shape[2], q.shape[3], v.shape[3]), dtype=dtype)
    state = state[sequence].to(dtype)
    return state.mT if state_v_first else state
