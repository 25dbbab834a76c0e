"""The states before each chunk where every memory slot has a gate of its own, and the gradients that arrive after each
chunk.

A state is [U, M], the gate on its columns: X' = X diag(d) + sum_j u_j (b_j w_j)^T, with b_j the decay from step j to
the chunk's end and d that of the whole chunk. In reverse, dX = dX' diag(d) + sum_i u_i (a_i w_i)^T over the queries
of all heads of the group, with a_i the decay from the chunk's start to step i. A state that is kept as [M, U] is
TRANSPOSED.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.chunk_index import first_row, sequence_bounds
from fla_ops.common.gpu.tiles import dot, load_rows, split_program, state_tile

from .chunks import Chunks
from .levels import from_start, load_log_decays, to_end


@triton.jit(do_not_specialize=["T"])
def channel_state_kernel(
    u, w, g,                                # [B, T, HW, U], [B, T, HW, M], [B, T, H, M]; HW = H * GROUP
    initial, states, final,                 # [N, H, U, M], [rows, H, U, M], [N, H, U, M]; TRANSPOSED: [..., M, U]
    cu_seqlens, chunk_ends,                 # [N + 1], [N]
    T,
    H: tl.constexpr, GROUP: tl.constexpr, U: tl.constexpr, M: tl.constexpr,
    BT: tl.constexpr, BU: tl.constexpr, BM: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):
    """One program carries one [BU, BM] tile of one head's state along one sequence."""
    SLOT_BLOCKS: tl.constexpr = (M + BM - 1) // BM
    WIDTH_BLOCKS: tl.constexpr = (U + BU - 1) // BU
    n, head, block = split_program(WIDTH_BLOCKS * SLOT_BLOCKS, H)
    width, slot = block // SLOT_BLOCKS * BU, block % SLOT_BLOCKS * BM
    start, length = sequence_bounds(n, cu_seqlens, T)
    row = first_row(n, chunk_ends, T, BT)
    g += head * M
    u += head * (GROUP * U)
    w += head * (GROUP * M)

    state = tl.zeros([BU, BM], tl.float32)
    at, inside = state_tile(n * H + head, width, slot, U, M, BU, BM, TRANSPOSED)
    if initial is not None:
        state += tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    chunks = tl.cdiv(length, BT)
    for c in range(chunks):
        i = chunks - 1 - c if REVERSE else c
        first, steps = start + i * BT, length - i * BT
        if states is not None:
            into, kept = state_tile((row + i) * H + head, width, slot, U, M, BU, BM, TRANSPOSED)
            tl.store(states + into, state, mask=kept)
        log_decay = load_log_decays(g, first, steps, slot, H, M, BT, BM)
        if REVERSE:
            edge = from_start(g, first, steps, slot, H, M, BT, BM)
        else:
            edge = to_end(g, first, steps, slot, H, M, BT, BM)
        state *= tl.exp2(tl.sum(log_decay, 0))[None, :]
        for j in range(GROUP):
            rows = load_rows(u + j * U, first, steps, width, H * GROUP, U, BT, BU).to(tl.float32)
            columns = load_rows(w + j * M, first, steps, slot, H * GROUP, M, BT, BM) * edge
            state += dot(tl.trans(rows), columns, PRECISION)
    if final is not None:
        tl.store(final + at, state.to(final.dtype.element_ty), mask=inside)


def channel_states(
    chunks: Chunks,
    u: Tensor,
    w: Tensor,
    initial: Tensor | None,
    final: Tensor | None,
    transposed: bool,
    reverse: bool = False,
    keep: bool = True,
) -> Tensor | None:
    """The state before each chunk, [rows, H, U, M] (transposed: [rows, H, M, U]) in float32; fills `final` where given.

    With reverse=True, u and w are those of the queries, and the result is the gradient that arrives after each chunk.
    """
    (_, time, heads, slots), width, index = chunks.g.shape, u.shape[3], chunks.index
    widths = (slots, width) if transposed else (width, slots)
    allocate = torch.zeros if chunks.packed else torch.empty  # packed sequences may leave rows unused
    states = allocate(index.rows, heads, *widths, dtype=torch.float32, device=u.device) if keep else None
    entry = launch.entry("channel_state", u, width, slots)
    width_block, slot_block = launch.block(entry["BU"], width), launch.block(entry["BM"], slots)
    launch.run(
        channel_state_kernel,
        chunks.sequences * heads * triton.cdiv(width, width_block) * triton.cdiv(slots, slot_block),
        u, w, chunks.g, initial, states, final, chunks.cu_seqlens, index.ends, time,
        H=heads, GROUP=u.shape[2] // heads, U=width, M=slots, BT=index.size, BU=width_block, BM=slot_block,
        REVERSE=reverse, TRANSPOSED=transposed, PRECISION=launch.precision(entry), **launch.options(entry),
    )
    return states
