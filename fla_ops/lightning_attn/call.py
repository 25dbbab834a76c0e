"""The arguments of lightning_attn's forms and of its decay, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fla_ops.signature import Signature, Size

# The axes of every tensor. A size is bound by the first tensor that has its letter; the others must agree.
AXES = {
    "q": "B T HK K",
    "v": "B T H V",
    "k": "B T HK K",
    "cu_seqlens": "N+1",
    "cu_seqlens_cpu": "N+1",
    "initial_state": "N H K V",
    "o": "B T H V",
    "final_state": "N H K V",
}


class Call(NamedTuple):
    """One call of a form."""

    q: Tensor
    k: Tensor
    v: Tensor
    layer_idx: Size
    num_layers: Size
    scale: float | None = None
    initial_state: Tensor | None = None
    output_final_state: bool = False
    reverse: bool = False
    cu_seqlens: Tensor | None = None
    chunk_size: int = 64
    cu_seqlens_cpu: Tensor | None = None
    slopes: str = "linear"
    mode: str = "auto"

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return AXES

    @property
    def sequences(self) -> Size:
        """N, the sequences of the batch or of the pack."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class Decay(NamedTuple):
    """The log decays of one layer's heads."""

    num_heads: Size
    layer_idx: Size
    num_layers: Size
    slopes: str = "linear"
    dtype: torch.dtype | None = None
    device: torch.device | None = None


class Outputs(NamedTuple):
    """What the forms return."""

    o: Tensor
    final_state: Tensor | None


CHUNK = Signature("chunk_lightning_attn", Call, Outputs, without=("reverse", "mode"))
FUSED_CHUNK = Signature("fused_chunk_lightning_attn", Call, Outputs, without=CHUNK.without)
RECURRENT = Signature("fused_recurrent_lightning_attn", Call, Outputs, without=("chunk_size", "mode"))
DISPATCHER = Signature("lightning_attn", Call, Outputs, last=("reverse", "slopes", "mode"))
DECAY = Signature("lightning_decay", Decay, "Tensor")
