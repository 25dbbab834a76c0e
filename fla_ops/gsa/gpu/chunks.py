"""The chunks of a call on a GPU, as every launch over them takes them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import packed_sequences
from fla_ops.common.gpu.chunk_index import ChunkIndex

from ..call import Call


@dataclass(frozen=True)
class Chunks:
    """The gates of a call, and where its chunks lie."""

    g: Tensor  # [B, T, H, M], contiguous
    cu_seqlens: Tensor | None
    index: ChunkIndex

    @property
    def levels(self) -> int:
        """How often a chunk is cut in halves."""
        return self.index.size.bit_length() - 1

    @property
    def sequences(self) -> int:
        """How many there are, in a batch or in a pack."""
        return self.packed or self.g.shape[0]

    @property
    def packed(self) -> int:
        """How many sequences are packed; 0 for a batch."""
        return packed_sequences(self.cu_seqlens)


def chunks_of(c: Call) -> Chunks:
    """The chunks of a call that has gates."""
    batch, time = c.q.shape[:2]
    return Chunks(c.g, c.cu_seqlens, chunk_index.build(batch, time, c.cu_seqlens, c.chunk_steps))
