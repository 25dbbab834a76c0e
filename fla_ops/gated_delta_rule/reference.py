"""The definition of the gated delta rule: the recurrence. Slow, plain, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S' = exp(g_t) S_{t-1},  u_t = beta_t (v_t - S'^T k_t),  S_t = S' + k_t u_t^T,  o_t = scale * S_t^T q_t.

    Returns o [B, T, H, V] and the last S [N, H, K, V].
    """
    if cu_seqlens is not None:
        runs = []
        for n, (start, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
            steps = slice(start, end)
            gates = (None if g is None else g[:, steps], beta[:, steps])
            state = None if initial_state is None else initial_state[n : n + 1]
            piece = (q[:, steps], k[:, steps], v[:, steps])
            runs.append(recurrent(*piece, *gates, scale, state, use_qk_l2norm_in_kernel, state_v_first))
        return torch.cat([o for o, _ in runs], 1), torch.cat([state for _, state in runs])

    batch, time, heads, value_width = v.shape
    key_width = q.shape[3]
    scale = key_width**-0.5 if scale is None else scale
    dtype = torch.float64 if v.dtype is torch.float64 else torch.float32
    q, k = (x.to(dtype).repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    values, beta = v.to(dtype), beta.to(dtype)
    decay = torch.ones(batch, time, heads, dtype=dtype, device=v.device) if g is None else g.to(dtype).exp()

    state = torch.zeros(batch, heads, key_width, value_width, dtype=dtype, device=v.device)
    if initial_state is not None:
        state = initial_state.to(dtype).mT if state_v_first else initial_state.to(dtype)
    outputs = []
    for t in range(time):
        key = k[:, t, :, :, None]
        state = state * decay[:, t, :, None, None]
        change = beta[:, t, :, None] * (values[:, t] - (key * state).sum(-2))
        state = state + key * change[:, :, None, :]
        outputs.append(scale * (q[:, t, :, :, None] * state).sum(-2))
    o = torch.stack(outputs, 1) if time else torch.zeros_like(values)
    return o.to(v.dtype), state.mT if state_v_first else state
