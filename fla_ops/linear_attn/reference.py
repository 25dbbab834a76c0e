"""The definition of linear_attn: simple_gla's recurrence without decay, and the division by the keys' running sum."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.simple_gla import reference as simple_gla

EPSILON = 1e-10


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    initial_z: Tensor | None = None,
    normalize: bool = True,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """S_t = S_{t-1} + k_t v_t^T,  z_t = z_{t-1} + k_t,  o_t = scale S_t^T q_t / (scale q_t . z_t + 1e-10).

    Without `normalize` the denominator is 1. Returns o [B, T, H, V], the last S [N, H, K, V], and the last z
    [N, 1, H, K] where there is one.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o, state = simple_gla.recurrent(q, k, v, None, None, scale, initial_state, reverse, False, cu_seqlens)
    if not normalize:
        return o, state, None
    o, z = divide(q, k, o, scale, initial_z, reverse, cu_seqlens)
    return o, state, z


def divide(
    q: Tensor,
    k: Tensor,
    o: Tensor,
    scale: float | None = 1.0,
    initial_z: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t / (scale q_t . z_t + 1e-10); returns it [B, T, H, V], and the last z [N, 1, H, K]."""
    if cu_seqlens is not None:
        runs = []
        for n, (start, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
            z = None if initial_z is None else initial_z[n : n + 1]
            runs.append(divide(q[:, start:end], k[:, start:end], o[:, start:end], scale, z, reverse))
        outputs, sums = zip(*runs, strict=True)
        return torch.cat(outputs, 1), torch.cat(sums)

    batch, time, heads, _ = o.shape
    scale = q.shape[3] ** -0.5 if scale is None else scale
    dtype = torch.float64 if o.dtype is torch.float64 else torch.float32
    q, k = (x.to(dtype).repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    values = o.to(dtype)
    z = k.new_zeros(batch, heads, q.shape[3]) if initial_z is None else initial_z[:, 0].to(dtype)
    quotients = [values.new_zeros(batch, heads, o.shape[3])] * time
    for t in reversed(range(time)) if reverse else range(time):
        z = z + k[:, t]
        quotients[t] = values[:, t] / (scale * (q[:, t] * z).sum(-1, keepdim=True) + EPSILON)
    normalized = torch.stack(quotients, 1) if time else torch.zeros_like(values)
    return normalized.to(o.dtype), z.unsqueeze(1)
