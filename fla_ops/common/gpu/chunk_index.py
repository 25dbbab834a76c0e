"""Where the chunks of dense and packed sequences lie: built on the device, never read back, looked up by kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch

BLOCK = 64  # sequences that are counted at once
ROWS = 64  # of the index in a program


@dataclass(frozen=True)
class ChunkIndex:
    """Chunks of `size` steps in rows, one sequence after the other.

    A dense batch has the same number of rows for each sequence. Packed sequences have at most `rows`: the unused ones,
    at the end, name sequence N.
    """

    size: int
    rows: int
    sequence: Tensor | None  # [rows] int32: which sequence, when packed
    ends: Tensor | None  # [N] int64: running sum of the sequences' chunk counts, when packed


def build(batch: int, time: int, cu_seqlens: Tensor | None, size: int) -> ChunkIndex:
    """The index for [batch, time] or for the sequences that cu_seqlens [N + 1] packs into `time` steps."""
    if cu_seqlens is None:
        return ChunkIndex(size, batch * triton.cdiv(time, size), None, None)
    sequences = cu_seqlens.shape[0] - 1
    rows = (time + sequences * (size - 1)) // size
    sequence = torch.empty(rows, dtype=torch.int32, device=cu_seqlens.device)
    ends = torch.empty(sequences, dtype=torch.int64, device=cu_seqlens.device)
    launch.run(
        chunk_index_kernel,
        max(triton.cdiv(rows, ROWS), 1),
        *(cu_seqlens, sequence, ends, sequences, rows),
        BT=size, BLOCK=BLOCK, ROWS=ROWS, num_warps=4,
    )
    return ChunkIndex(size, rows, sequence, ends)


@triton.jit(do_not_specialize=["N", "rows"])
def chunk_index_kernel(
    cu_seqlens, chunk_sequence, chunk_ends,     # [N + 1], [rows], [N]
    N, rows,
    BT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):
    """A row lies in the sequence that as many sequences before it end at or before the row. Each program counts the
    chunks of all sequences; the first one writes where they end.
    """
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    before = tl.zeros([ROWS], tl.int32)
    total = tl.zeros([], tl.int32)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        start = tl.load(cu_seqlens + n, mask=n < N, other=0).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1, mask=n < N, other=0).to(tl.int32)
        chunks = (end - start + BT - 1) // BT
        ends = total + tl.cumsum(chunks)
        tl.store(chunk_ends + n, ends.to(tl.int64), mask=(n < N) & (program == 0))
        ended = (ends[None, :] <= row[:, None]) & (n < N)[None, :]
        before += tl.sum(ended.to(tl.int32), 1)
        total += tl.sum(chunks)
    tl.store(chunk_sequence + row, before, mask=row < rows)


@triton.jit
def sequence_bounds(n, cu_seqlens, T):
    """First step (int64) and length of sequence n."""
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - start).to(tl.int32)
    else:
        start, length = n * T, T
    return start, length


@triton.jit
def first_row(n, chunk_ends, T, BT: tl.constexpr):
    """The row of the first chunk of sequence n."""
    return tl.load(chunk_ends + n - 1, mask=n > 0, other=0) if chunk_ends is not None else n * tl.cdiv(T, BT)


@triton.jit
def sequence_of(row, chunk_sequence, T, BT: tl.constexpr):
    """The sequence whose chunk lies in this row; N in an unused row."""
    return tl.load(chunk_sequence + row) if chunk_sequence is not None else row // tl.cdiv(T, BT)


@triton.jit
def locate_chunk(
    row, cu_seqlens, chunk_sequence, chunk_ends,    # int64, [N + 1], [rows], [N]
    T, N, BT: tl.constexpr,
):
    """The sequence's first step (int64) and length, and which of its chunks lies in this row.

    In an unused row the length is 0.
    """
    if cu_seqlens is not None:
        n = tl.load(chunk_sequence + row)
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + tl.minimum(n + 1, N)) - start).to(tl.int32)
        chunk = row - first_row(n, chunk_ends, T, BT)
    else:
        chunks = tl.cdiv(T, BT)
        start, length, chunk = row // chunks * T, T, row % chunks
    return start, length, chunk.to(tl.int32)
