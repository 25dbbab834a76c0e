"""ABC as gates, on a CPU: a running logsumexp over time, and its gradient.

With z = logcumsumexp(s) over the time of each sequence, slot m is written with weight w_t = exp(s_t - z_t) and fades by
g_t = z_{t-1} - z_t <= 0, with g = 0 at the first step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.common.cpu.chunks import runs

from .chunked import compute_dtype


def gates(s: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """s and g as they are, or where g is None w and g of ABC, [B, T, H, M] in the dtype of the computation."""
    if g is not None:
        return s, g
    w, g = (s.new_empty(s.shape, dtype=compute_dtype(s)) for _ in range(2))
    for _, start, end in runs(s, cu_seqlens):
        slots = _walking(s[:, start:end].to(g.dtype), reverse)
        z = slots.logcumsumexp(1)
        fading = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1] - z[:, 1:]], 1)
        w[:, start:end] = _walking((slots - z).exp_(), reverse)
        g[:, start:end] = _walking(fading, reverse)
    return w, g


def gradient(
    s: Tensor,
    w: Tensor,
    g: Tensor,
    cu_seqlens: Tensor | None,
    dw: Tensor | None,
    dg: Tensor | None,
    reverse: bool = False,
) -> Tensor | None:
    """ds in s's dtype, from the gradients of w and g; None where they are.

    dz_t = dg_{t+1} - dg_t - w_t dw_t and ds_u = w_u (dw_u + sum_{t >= u} exp(z_u - z_t) dz_t). The sum is a running
    logsumexp from the end, of its positive and of its negative terms.
    """
    if dw is None or dg is None:
        return None
    ds = torch.empty_like(s, memory_format=torch.contiguous_format)
    for _, start, end in runs(s, cu_seqlens):
        weights, fading, dweights, dfading = (_walking(x[:, start:end], reverse) for x in (w, g, dw, dg))
        z = -fading.cumsum(1)  # up to a constant: only differences count
        dz = -weights * dweights
        dz[:, 1:] -= dfading[:, 1:]
        dz[:, :-1] += dfading[:, 1:]
        later = _later_sum(dz.clamp(min=0), z) - _later_sum((-dz).clamp_(min=0), z)
        ds[:, start:end] = _walking(weights * (dweights + later), reverse)
    return ds


def _later_sum(dz: Tensor, z: Tensor) -> Tensor:
    """sum_{t >= u} exp(z_u - z_t) dz_t for dz >= 0."""
    return ((dz.log() - z).flip(1).logcumsumexp(1).flip(1) + z).exp_()


def _walking(x: Tensor, reverse: bool) -> Tensor:
    """Steps in the order in which the recurrence takes them."""
    return x.flip(1) if reverse else x
