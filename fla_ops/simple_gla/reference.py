"""The definition of simple_gla: the recurrence, and the quadratic form. Slow, plain, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T,  o_t = scale * S_t^T q_t.

    Returns o [B, T, H, V] and the last S [N, H, K, V].
    """
    if cu_seqlens is not None:
        runs = []
        for n, (start, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
            steps = slice(start, end)
            gate = None if g is None else g[:, steps]
            state = None if initial_state is None else initial_state[n : n + 1]
            piece = (q[:, steps], k[:, steps], v[:, steps])
            runs.append(recurrent(*piece, gate, g_gamma, scale, state, reverse, state_v_first))
        return torch.cat([o for o, _ in runs], 1), torch.cat([state for _, state in runs])

    batch, time, heads, value_width = v.shape
    key_width = q.shape[3]
    scale = key_width**-0.5 if scale is None else scale
    dtype = torch.float64 if v.dtype is torch.float64 else torch.float32
    q, k = (x.to(dtype).repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    values = v.to(dtype)
    decay = torch.ones(batch, time, heads, dtype=dtype, device=v.device)
    if g is not None:
        decay = g.to(dtype).exp()
    if g_gamma is not None:
        decay = g_gamma.to(dtype).exp().expand(batch, time, heads)

    state = torch.zeros(batch, heads, key_width, value_width, dtype=dtype, device=v.device)
    if initial_state is not None:
        state = initial_state.to(dtype).mT if state_v_first else initial_state.to(dtype)
    outputs = [values.new_zeros(batch, heads, value_width)] * time
    for t in reversed(range(time)) if reverse else range(time):
        state = state * decay[:, t, :, None, None] + k[:, t, :, :, None] * values[:, t, :, None, :]
        outputs[t] = scale * (q[:, t, :, :, None] * state).sum(-2)
    o = torch.stack(outputs, 1) if time else torch.zeros_like(values)
    return o.to(v.dtype), state.mT if state_v_first else state


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """attn_ij = scale * exp(g_{j+1} + ... + g_i) q_i.k_j for j <= i in one sequence.

    Returns o = attn v [B, T, H, V] and attn [B, H, T, T].
    """
    batch, time, heads, _ = v.shape
    scale = q.shape[3] ** -0.5 if scale is None else scale
    dtype = torch.float64 if v.dtype is torch.float64 else torch.float32
    q, k = (x.to(dtype).repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    if g_gamma is not None:
        g = g_gamma.expand(batch, time, heads)
    position = torch.arange(time, device=v.device)
    visible = position[:, None] >= position
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
        visible = visible & (sequence[:, None] == sequence)
    rows = []
    for i in range(time):
        decay = torch.zeros(batch, heads, time, dtype=dtype, device=v.device)
        if g is not None:
            since = (position > torch.arange(time, device=v.device)[:, None]) & (position <= i)  # [j, s]: j < s <= i
            decay = torch.where(since, g.to(dtype).mT[:, :, None], 0.0).sum(-1)
        score = torch.einsum("bhk,bjhk->bhj", q[:, i], k)
        rows.append(scale * torch.where(visible[i], torch.where(visible[i], decay, 0.0).exp() * score, 0.0))
    attn = torch.stack(rows, 2) if time else q.new_zeros(batch, heads, 0, 0)
    return torch.einsum("bhij,bjhv->bihv", attn, v.to(dtype)).to(v.dtype), attn.to(v.dtype)
