"""The normalisation as ATen calls, over any chunk layout; forward and backward.

Inside a chunk, q_t . z_t is the sum of row t of the causal q k^T, plus q_t . z with z the sum that enters the chunk:

    d_t = scale (sum_{s <= t} q_t . k_s + q_t . z) + 1e-10,    y_t = o_t / d_t

With w_t = -scale (dy_t . y_t) / d_t the gradients are do_t = dy_t / d_t, dq_t = w_t z_t, dk_s = sum_{t >= s} w_t q_t.
Tensors are [rows, lanes, HK, C, width]; sums of keys are [rows, lanes, HK, G, K], with G the value heads of a group
where an initial z tells them apart, else 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-10


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def scale_of(q: Tensor, scale: float | None) -> float:
    """K ** -0.5 for None."""
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def forward(
    layout: Any,
    q: Tensor,
    k: Tensor,
    o: Tensor,
    scale: float | None,
    initial_z: Tensor | None,
    output_final_z: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor | None]:
    """y [B, T, H, V] in o's dtype, and the last z [N, 1, H, K] in the carried dtype."""
    queries, keys = (layout.split(x, compute_dtype(o)) for x in (q, k))
    before, final = _running(layout, keys.sum(-2), _enter(initial_z, keys), reverse)
    y = o / _denominator(layout, queries, keys, before, q, o, scale, reverse)
    return y.to(o.dtype).contiguous(), _leave(final, o) if output_final_z else None


def backward(
    layout: Any,
    q: Tensor,
    k: Tensor,
    y: Tensor,
    initial_z: Tensor | None,
    dy: Tensor,
    dfinal_z: Tensor | None,
    scale: float | None,
    reverse: bool,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that output_mask asks for, each in its input's dtype; the sums are computed again, not saved."""
    need_q, need_k, need_o, need_z = output_mask
    dtype, key_heads = compute_dtype(y), q.shape[2]
    dq = dk = do = dz = None
    queries, keys = (layout.split(x, dtype) for x in (q, k))
    before, _ = _running(layout, keys.sum(-2), _enter(initial_z, keys), reverse)
    d = _denominator(layout, queries, keys, before, q, y, scale, reverse)
    if need_o:
        do = (dy / d).to(y.dtype).contiguous()
    if need_q or need_k or need_z:
        w = -scale_of(q, scale) * torch.linalg.vecdot(dy.to(dtype), y.to(dtype)).unsqueeze(-1) / d
        weights = layout.split(w.flatten(2).unflatten(2, (key_heads, -1)), dtype)  # [rows, lanes, HK, C, H / HK]
        if initial_z is None:
            weights = weights.sum(-1, keepdim=True)
        weight = weights.sum(-1, keepdim=True)
        since = _causal(keys, reverse)
        if need_q:
            dq = layout.join(weights @ before + weight * (since @ keys), q.dtype)
        if need_k or need_z:
            dfinal = _enter(dfinal_z, keys)
            if dfinal is not None and initial_z is None:
                dfinal = dfinal.sum(2, keepdim=True)
            after, dz = _running(layout, weights.mT @ queries, dfinal, not reverse)
            if need_k:
                dk = layout.join(since.mT @ (weight * queries) + after.sum(-2, keepdim=True), k.dtype)
            dz = _leave(dz, y).to(initial_z.dtype) if need_z else None
    return dq, dk, do, dz


def _enter(z: Tensor | None, keys: Tensor) -> Tensor | None:
    """[N, 1, H, K] to [N, HK, G, K] in the dtype of the keys in chunks."""
    return None if z is None else z.squeeze(1).to(keys.dtype).unflatten(1, (keys.shape[2], -1))


def _leave(z: Tensor, o: Tensor) -> Tensor:
    """[N, HK, G or 1, K] to [N, 1, H, K], contiguous."""
    z = z.expand(-1, -1, o.shape[2] // z.shape[1], -1)
    return z.flatten(1, 2).unsqueeze(1).clone(memory_format=torch.contiguous_format)


def _running(layout: Any, added: Tensor, initial: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """The sum before each chunk [rows, lanes, HK, G, K] and the last [N, HK, G, K], of what each chunk adds."""
    added = added.unsqueeze(3) if added.dim() == 4 else added
    if initial is not None:
        added = added.expand(-1, -1, -1, initial.shape[2], -1).contiguous()
    before, final = layout.scan(added, None, initial, reverse)
    return before, final


def _causal(x: Tensor, reverse: bool) -> Tensor:
    """Ones where step t [rows] has seen step s [columns]."""
    ones = x.new_ones(x.shape[-2], x.shape[-2])
    return ones.triu_() if reverse else ones.tril_()


def _denominator(
    layout: Any,
    queries: Tensor,
    keys: Tensor,
    before: Tensor,
    q: Tensor,
    o: Tensor,
    scale: float | None,
    reverse: bool,
) -> Tensor:
    """[B, T, H, 1] in the compute dtype."""
    products = queries @ keys.mT
    inside = (products.triu_() if reverse else products.tril_()).sum(-1, keepdim=True)
    d = layout.join((queries @ before.mT).add_(inside).mul_(scale_of(q, scale)).add_(EPSILON), keys.dtype)
    return d.expand(-1, -1, -1, o.shape[2] // d.shape[2]).flatten(2).unsqueeze(-1)
