"""The chunks of a call on a GPU, as every launch over them takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import packed_sequences
from fla_ops.common.gpu.chunk_index import ChunkIndex

from ..call import Call


@dataclass(frozen=True)
class Chunks:
    """A call whose tensors are contiguous, and where its chunks lie."""

    call: Call
    index: ChunkIndex

    @property
    def pairs(self) -> tuple[int, ...]:
        """The shape of a matrix of pairs of steps for each chunk and head."""
        return self.index.rows, self.call.v.shape[2], self.index.size, self.index.size

    def new(self, shape: tuple[int, ...]) -> Tensor:
        """An empty tensor in float32."""
        return torch.empty(shape, dtype=torch.float32, device=self.call.v.device)

    @property
    def by_row(self) -> tuple[Any, ...]:
        """The last arguments of a kernel with programs for every chunk."""
        c, index = self.call, self.index
        return c.cu_seqlens, index.sequence, index.ends, c.q.shape[1], packed_sequences(c.cu_seqlens)

    @property
    def by_sequence(self) -> tuple[Any, ...]:
        """The last arguments of a kernel that walks along sequences."""
        return self.call.cu_seqlens, self.index.ends, self.call.q.shape[1]

    @property
    def flags(self) -> dict[str, Any]:
        """What kernels are compiled for, beside widths and blocks."""
        return {"DECAY": decay_of(self.call), "NORMALIZE": self.call.use_qk_l2norm_in_kernel}


def decay_of(c: Any) -> str:
    """DECAY, as `common.gpu.decay` takes it."""
    return "none" if c.g is None else "step"


def is_half(c: Any) -> bool:
    """HALF: whether activations have 16 bits."""
    return c.v.dtype is not torch.float32


def chunks_of(c: Call, back: bool = False) -> Chunks:
    """The chunks of a call: as long as asked for, or as the walks over them can have them."""
    names = ("delta_state", "delta_state_gradient") if back else ("delta_state",)
    steps = min(launch.entry(name, c.q, c.q.shape[3], c.v.shape[3])["BT"] for name in names)
    batch, time = c.q.shape[:2]
    return Chunks(c, chunk_index.build(batch, time, c.cu_seqlens, min(c.chunk_size, steps)))
