"""The definition of lightning_attn: its decay, and the recurrence it decays."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.simple_gla import reference as simple_gla


def decay(num_heads: int, layer_idx: int, num_layers: int, slopes: str = "linear") -> Tensor:
    """g_gamma [H] in float64, head by head."""
    if slopes == "linear":
        rates = [-(8 / num_heads) * (1 - layer_idx / num_layers) * h for h in range(num_heads)]
    else:
        depth = 1 - layer_idx / (num_layers - 1 + 1e-5) + 1e-5
        rates = [-(2 ** (-8 * (h + 1) / num_heads)) * depth for h in range(num_heads)]
    return torch.tensor(rates, dtype=torch.float64)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    slopes: str = "linear",
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_gamma) S_{t-1} + k_t v_t^T,  o_t = scale S_t^T q_t; returns o and the last S."""
    g_gamma = decay(v.shape[2], layer_idx, num_layers, slopes).to(v.device)
    return simple_gla.recurrent(q, k, v, None, g_gamma, scale, initial_state, reverse, False, cu_seqlens)
