"""lightning_attn as simple_gla with a constant decay: the bodies of the composite operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_ops.signature import Signature
from fla_ops.simple_gla import call as simple_gla
from fla_ops.validation import positive, state_dtype

from . import checks
from .call import Call, Decay, Outputs


def decay(c: Decay) -> Tensor:
    """The log decay [H], computed on the device."""
    checks.decay(c)
    head = torch.arange(c.num_heads, dtype=c.dtype or torch.float32, device=c.device)
    if c.slopes == "linear":
        return head.mul_(-8 / c.num_heads * (1 - c.layer_idx / c.num_layers))
    depth = 1 - c.layer_idx / (c.num_layers - 1 + 1e-5) + 1e-5
    return torch.exp2(head.add_(1).mul_(-8 / c.num_heads)).mul_(-depth)


def chunk(c: Call) -> Outputs:
    """The body of torch.ops.fla.chunk_lightning_attn."""
    return _run(c, simple_gla.CHUNK)


def fused_chunk(c: Call) -> Outputs:
    """The body of torch.ops.fla.fused_chunk_lightning_attn."""
    return _run(c, simple_gla.FUSED_CHUNK)


def fused_recurrent(c: Call) -> Outputs:
    """The body of torch.ops.fla.fused_recurrent_lightning_attn."""
    return _run(c, simple_gla.RECURRENT)


def _run(c: Call, form: Signature) -> Outputs:
    """One of simple_gla's forms, with this layer's decay in the dtype of the state."""
    positive("v", c.v.shape[2], "H")
    decays = Decay(c.v.shape[2], c.layer_idx, c.num_layers, c.slopes, state_dtype(c.v), c.v.device)
    packing: dict[str, Any] = {"cu_seqlens": c.cu_seqlens, "cu_seqlens_cpu": c.cu_seqlens_cpu}
    state: dict[str, Any] = {
        "initial_state": c.initial_state,
        "output_final_state": c.output_final_state,
        "reverse": c.reverse,
    }
    operator: Any = getattr(torch.ops.fla, form.name)
    settings: dict[str, Any] = {"scale": c.scale, "chunk_size": c.chunk_size, "g_gamma": decay(decays)}
    return Outputs(*operator(*form.arguments_of(simple_gla.Call(c.q, c.k, c.v, **state, **packing, **settings))))
