"""fla's rotary position embedding as ATen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fla_ops.integrations.fla.norms import wide
from fla_ops.integrations.fla.replacing import adapts, replaces


@replaces("fla.modules.rotary.ops:rotary_embedding")
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """x [B, T, H, D]; cos and sin [S, R / 2], a row for each position, turn the first R channels."""
    steps = _positions(x, seqlen_offsets, cu_seqlens)
    o = _rotate(x, cos[steps], sin[steps], interleaved)
    return x.copy_(o) if inplace else o


@adapts("fla.modules.rotary.ops:RotaryEmbedding.forward")
def rotary_forward(theirs: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(
        self: Any,
        q: Tensor,
        k: Tensor,
        seqlen_offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        chunk_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both turned by their positions, without fla's table of all positions: it would grow at every step of
        decoding, and compiled code would depend on its length.
        """
        if self.scale is not None or not self.pos_idx_in_fp32:  # XPos, or positions in the model's dtype
            return theirs(self, q, k, seqlen_offset, cu_seqlens, max_seqlen, chunk_indices)
        inverse = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(q.device)
        angles = _positions(q, seqlen_offset, cu_seqlens)[..., None].float() * inverse
        cos, sin = angles.cos(), angles.sin()
        return _rotate(q, cos, sin, self.interleaved), _rotate(k, cos, sin, self.interleaved)

    return forward


def _positions(x: Tensor, offset: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[T] or [B, T], the position of each step in its sequence; offset is one number or [N]."""
    steps = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return steps + (offset[:, None] if isinstance(offset, Tensor) else offset)
    sequence = torch.searchsorted(cu_seqlens, steps, right=True) - 1
    return steps - cu_seqlens[sequence] + (offset[sequence] if isinstance(offset, Tensor) else offset)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, T, H, D] with cos and sin [T, R / 2] or [B, T, R / 2]."""
    cos, sin = wide(cos).unsqueeze(-2), wide(sin).unsqueeze(-2)
    width = 2 * cos.shape[-1]
    turned = wide(x[..., :width])
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    o = (torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)).to(x.dtype)
    return o if width == x.shape[-1] else torch.cat([o, x[..., width:]], -1)
