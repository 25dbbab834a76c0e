"""The definition of gsa: both recurrences, and the gates of ABC. Slow, plain, differentiable by autograd."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_k: Tensor | None = None,
    initial_v: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A_t = A_{t-1} diag(exp g_t) + k_t s_t^T,  p_t = softmax(scale A_t^T q_t),
    C_t = diag(exp g_t) C_{t-1} + s_t v_t^T,  o_t = C_t^T p_t.

    Returns o [B, T, HQ, V] and the last A [N, H, K, M] and C [N, H, M, V].
    """
    if cu_seqlens is not None:
        runs = []
        for n, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            pieces = (q[:, start:end], k[:, start:end], v[:, start:end], s[:, start:end])
            gates = None if g is None else g[:, start:end]
            state_k, state_v = (None if x is None else x[n : n + 1] for x in (initial_k, initial_v))
            runs.append(recurrent(*pieces, gates, scale, state_k, state_v, reverse))
        return torch.cat([r[0] for r in runs], 1), torch.cat([r[1] for r in runs]), torch.cat([r[2] for r in runs])

    (batch, time, heads, value_width), slots = v.shape, s.shape[3]
    query_heads, key_width = q.shape[2:]
    scale = key_width**-0.5 if scale is None else scale
    dtype = torch.float64 if v.dtype is torch.float64 else torch.float32
    queries = q.to(dtype).unflatten(2, (heads, query_heads // heads))  # [B, T, H, HQ / H, K]
    keys, values = k.to(dtype), v.to(dtype)
    s, g = abc_gates(s, reverse) if g is None else (s.to(dtype), g.to(dtype))
    decay = g.exp()

    state_k = values.new_zeros(batch, heads, key_width, slots) if initial_k is None else initial_k.to(dtype)
    state_v = values.new_zeros(batch, heads, slots, value_width) if initial_v is None else initial_v.to(dtype)
    outputs = [queries.new_zeros(batch, query_heads, value_width)] * time
    for t in reversed(range(time)) if reverse else range(time):
        state_k = state_k * decay[:, t, :, None, :] + keys[:, t, :, :, None] * s[:, t, :, None, :]
        state_v = state_v * decay[:, t, :, :, None] + s[:, t, :, :, None] * values[:, t, :, None, :]
        x = scale * (queries[:, t] @ state_k)  # [B, H, HQ / H, M]
        outputs[t] = (x.softmax(-1) @ state_v).flatten(1, 2)
    o = torch.stack(outputs, 1) if time else queries.new_zeros(batch, 0, query_heads, value_width)
    return o.to(v.dtype), state_k, state_v


def abc_gates(s: Tensor, reverse: bool = False, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Vanilla ABC as gates, z = logcumsumexp(s) over time: s <- exp(s - z), g_t = z_{t-1} - z_t, g_0 = 0."""
    if cu_seqlens is not None:
        runs = [abc_gates(s[:, start:end], reverse) for start, end in itertools.pairwise(cu_seqlens.tolist())]
        all_weights, all_gates = zip(*runs, strict=True)
        return torch.cat(all_weights, 1), torch.cat(all_gates, 1)
    s = s.to(torch.float64 if s.dtype is torch.float64 else torch.float32)
    if reverse:
        weights, gates = abc_gates(s.flip(1))
        return weights.flip(1), gates.flip(1)
    z = s.logcumsumexp(1)
    g = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1] - z[:, 1:]], 1)
    return (s - z).exp(), g
