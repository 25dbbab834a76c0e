"""lightning_attn as simple_gla with a constant decay: the bodies of the composite operators."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import checks

Result = tuple[Tensor, Tensor | None]


def decay(
    num_heads: Any,
    layer_idx: Any,
    num_layers: Any,
    slopes: str,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The log decay [H], computed on the device."""
    checks.decay(num_heads, layer_idx, num_layers, slopes)
    head = torch.arange(num_heads, dtype=dtype or torch.float32, device=device)
    if slopes == "linear":
        return head.mul_(-8 / num_heads * (1 - layer_idx / num_layers))
    depth = 1 - layer_idx / (num_layers - 1 + 1e-5) + 1e-5
    return torch.exp2(head.add_(1).mul_(-8 / num_heads)).mul_(-depth)


def decay_of(v: Tensor, layer_idx: Any, num_layers: Any, slopes: str) -> Tensor:
    """The log decay of v's heads, in the dtype of the state."""
    dtype = torch.float64 if v.dtype is torch.float64 else torch.float32
    return decay(v.shape[2], layer_idx, num_layers, slopes, dtype, v.device)


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: Any,
    num_layers: Any,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    cu_seqlens_cpu: Tensor | None,
    slopes: str,
    operator: str = "chunk_simple_gla",
) -> Result:
    """The body of torch.ops.fla.chunk_lightning_attn, and with another operator of fused_chunk_lightning_attn."""
    g_gamma, packing = decay_of(v, layer_idx, num_layers, slopes), (cu_seqlens, cu_seqlens_cpu)
    state = (scale, initial_state, output_final_state, False)
    o, final_state = getattr(torch.ops.fla, operator)(q, k, v, None, g_gamma, *state, *packing, chunk_size)
    return o, final_state


fused_chunk = partial(chunk, operator="fused_chunk_simple_gla")


def fused_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: Any,
    num_layers: Any,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    reverse: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    slopes: str,
) -> Result:
    """The body of torch.ops.fla.fused_recurrent_lightning_attn."""
    g_gamma, packing = decay_of(v, layer_idx, num_layers, slopes), (cu_seqlens, cu_seqlens_cpu)
    state = (scale, initial_state, output_final_state, reverse, False)
    o, final_state = torch.ops.fla.fused_recurrent_simple_gla(q, k, v, None, g_gamma, *state, *packing)
    return o, final_state
