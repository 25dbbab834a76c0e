"""ABC as gates, on a CPU: a running logsumexp over the time of one sequence, and its gradient.

With z = logcumsumexp(s), memory slot m is written with weight w_t = exp(s_t - z_t) and fades by g_t = z_{t-1} - z_t,
which is <= 0, and 0 at the first step. Tensors are [T, H, M]; with reverse=True time runs backwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.validation import state_dtype


def gates(s: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """w and g in the dtype of the computation."""
    s = _in_order(s.to(state_dtype(s)), reverse)
    z = s.logcumsumexp(0)
    g = torch.cat([torch.zeros_like(z[:1]), z[:-1] - z[1:]])
    return _in_order((s - z).exp_(), reverse), _in_order(g, reverse)


def gradient(w: Tensor, g: Tensor, dw: Tensor, dg: Tensor, reverse: bool) -> Tensor:
    """The gradient of s from those of w and g.

    dz_t = dg_{t+1} - dg_t - w_t dw_t and ds_u = w_u (dw_u + sum_{t >= u} exp(z_u - z_t) dz_t). The sum is a running
    logsumexp from the end, of its positive and of its negative terms.
    """
    w, g, dw, dg = (_in_order(x, reverse) for x in (w, g, dw, dg))
    z = -g.cumsum(0)  # up to a constant: only differences count
    dz = -w * dw
    dz[1:] -= dg[1:]
    dz[:-1] += dg[1:]
    later = _later_sum(dz.clamp(min=0), z) - _later_sum((-dz).clamp_(min=0), z)
    return _in_order(w * (dw + later), reverse)


def _later_sum(dz: Tensor, z: Tensor) -> Tensor:
    """sum_{t >= u} exp(z_u - z_t) dz_t for dz >= 0."""
    return ((dz.log() - z).flip(0).logcumsumexp(0).flip(0) + z).exp_()


def _in_order(x: Tensor, reverse: bool) -> Tensor:
    """Steps in the order in which the recurrence takes them."""
    return x.flip(0) if reverse else x
