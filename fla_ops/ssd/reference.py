"""The definition of ssd: Mamba-2's recurrence with its step sizes, skip connection and gate."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus


def recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T, o_t = (S_t C_t + D x_t) silu(z_t): o [B, T, H, V], S [N, H, V, K].

    dt_t x_t and S_t C_t are rounded to x's dtype, as simple_gla takes values and gives its outputs.
    """
    if cu_seqlens is not None:
        states = [None] * (len(cu_seqlens) - 1) if initial_state is None else initial_state.split(1)
        parts = []
        for (start, end), state in zip(pairwise(cu_seqlens.tolist()), states, strict=True):
            a, d, b, c = (y[:, start:end] for y in (x, dt, B, C))
            gate = None if z is None else z[:, start:end]
            parts.append(recurrent(a, d, A, b, c, D, gate, dt_bias, dt_softplus, dt_limit, state))
        outputs, finals = zip(*parts, strict=True)
        return torch.cat(outputs, 1), torch.cat(finals)
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    (batch, time, heads, value), key = x.shape, B.shape[3]
    wide, B, C = x.to(dtype), *(y.to(dtype).repeat_interleave(heads // y.shape[2], 2) for y in (B, C))
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    g = A.to(dtype) * dt
    if seq_idx is not None:
        g = g.masked_fill((seq_idx != pad(seq_idx, (1, 0))[:, :-1])[..., None], -math.inf)
    state = x.new_zeros(batch, heads, value, key, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    rows = []
    for t in range(time):
        values = (dt[:, t, :, None] * wide[:, t]).to(x.dtype).to(dtype)
        state = g[:, t, :, None, None].exp() * state + values[..., None] * B[:, t, :, None]
        rows.append((state * C[:, t, :, None]).sum(-1))
    o = torch.stack(rows, 1).to(x.dtype).to(dtype) if rows else wide
    o = o if D is None else o + (D[:, None] if D.dim() == 1 else D).to(dtype) * wide
    o = o if z is None else o * silu(z.to(dtype))
    return o.to(x.dtype), state
