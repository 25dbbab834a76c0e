"""The gradient of scalar gates.

Where no states are known, from those of queries and keys, over one sequence:

    dg_t = sum_{s >= t} (q_s . dq_s - k_s . dk_s)

From the walks of the recurrent form, which know how it changes from step to step, and <S, dS> around the last step e of
every window; so no rounding adds up along the sequence:

    dg_t = exp(g_e) <S_{e-1}, dS_e> + sum_{t <= s < e} (reads_s - writes_s)

With REVERSE the sequence ran backwards in time: the sum runs over s <= t, and a window ends at its first step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.chunk_index import ChunkIndex, first_row, sequence_bounds
from fla_ops.common.gpu.decay import RESET, load_log_decay
from fla_ops.common.gpu.tiles import load_rows, nearest, split_program


@triton.jit(do_not_specialize=["T"])
def gate_gradient_kernel(
    q, k, dq, dk, g,                        # [B, T, HK, K] x 2, [B, T, H, K] x 2, [B, T, H] or [H]
    dg, cu_seqlens, T,                      # [B, T, H], [N + 1]
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr,
):
    n, head, _ = split_program(1, H)
    start, length = sequence_bounds(n, cu_seqlens, T)
    q += head // (H // HK) * K
    k += head // (H // HK) * K
    dq += head * K
    dk += head * K

    beyond = 0.0
    chunks = tl.cdiv(length, BT)
    for c in range(chunks):
        i = chunks - 1 - c
        first, steps = start + i * BT, length - i * BT
        change = tl.zeros([BT], tl.float32)
        for key in range(0, K, BK):
            read = load_rows(q, first, steps, key, HK, K, BT, BK).to(tl.float32)
            written = load_rows(k, first, steps, key, HK, K, BT, BK).to(tl.float32)
            read *= load_rows(dq, first, steps, key, H, K, BT, BK)
            written *= load_rows(dk, first, steps, key, H, K, BT, BK)
            change += tl.sum(read - written, 1)
        reset = load_log_decay(g, first, steps, head, H, BT, DECAY) <= RESET
        dlog_decay = tl.where(reset, 0.0, beyond + tl.cumsum(change, 0, reverse=True))
        t = tl.arange(0, BT)
        tl.store(dg + (first + t) * H + head, nearest(dlog_decay, dg.dtype.element_ty), mask=t < steps)
        beyond += tl.sum(change, 0)


def gate_gradient(
    q: Tensor,
    k: Tensor,
    dq: Tensor,
    dk: Tensor,
    gate: tuple[Tensor | None, str],
    index: ChunkIndex,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """dg [B, T, H] in `dtype`, from float32 gradients [B, T, H, K] of each value head's queries and keys."""
    batch, time, heads, key_width = dq.shape
    dg = torch.empty((batch, time, heads), dtype=dtype, device=dq.device)
    entry = launch.entry("gate_gradient", q, key_width, key_width)
    launch.run(
        gate_gradient_kernel,
        (batch if cu_seqlens is None else cu_seqlens.shape[0] - 1) * heads,
        q, k, dq, dk, gate[0], dg, cu_seqlens, time,
        H=heads, HK=q.shape[2], K=key_width, BT=index.size, BK=launch.block(entry["BK"], key_width), DECAY=gate[1],
        **launch.options(entry),
    )
    return dg


@triton.jit(do_not_specialize=["T"])
def windowed_gate_gradient_kernel(
    reads, writes, ends,                    # [B, T, H, PARTS] x 2, [rows, H, PARTS]
    g, dg,                                  # [B, T, H] or [H], [B, T, H]
    cu_seqlens, chunk_ends,                 # [N + 1], [N]
    T,
    H: tl.constexpr, BT: tl.constexpr, PARTS: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
):
    n, head, _ = split_program(1, H)
    start, length = sequence_bounds(n, cu_seqlens, T)
    row = first_row(n, chunk_ends, T, BT)
    t = tl.arange(0, BT)
    for i in range(tl.cdiv(length, BT)):
        first, steps = start + i * BT, length - i * BT
        at = (first + t) * H + head
        end = 0.0
        change = tl.zeros([BT], tl.float32)
        for part in range(PARTS):
            end += tl.load(ends + ((row + i) * H + head) * PARTS + part)
            change += tl.load(reads + at * PARTS + part, mask=t < steps, other=0.0)
            change -= tl.load(writes + at * PARTS + part, mask=t < steps, other=0.0)
        log_decay = load_log_decay(g, first, steps, head, H, BT, DECAY)
        change = tl.where(t == (0 if REVERSE else tl.minimum(BT, steps) - 1), tl.exp2(log_decay) * end, change)
        dlog_decay = tl.where(log_decay <= RESET, 0.0, tl.cumsum(change, 0, reverse=not REVERSE))
        tl.store(dg + at, nearest(dlog_decay, dg.dtype.element_ty), mask=t < steps)


def windowed_gate_gradient(
    reads: Tensor,
    writes: Tensor,
    ends: Tensor,
    gate: tuple[Tensor | None, str],
    index: ChunkIndex,
    cu_seqlens: Tensor | None,
    reverse: bool,
    dtype: torch.dtype,
) -> Tensor:
    """dg [B, T, H] in `dtype`, from reads and writes [B, T, H, parts], and <S_{e-1}, dS_e>, e the last step of each of
    the index's chunks, ends [rows, H, parts].
    """
    batch, time, heads, parts = reads.shape
    dg = torch.empty((batch, time, heads), dtype=dtype, device=reads.device)
    launch.run(
        windowed_gate_gradient_kernel,
        (batch if cu_seqlens is None else cu_seqlens.shape[0] - 1) * heads,
        reads, writes, ends, gate[0], dg, cu_seqlens, index.ends, time,
        H=heads, BT=index.size, PARTS=parts, DECAY=gate[1], REVERSE=reverse,
        **launch.options(launch.entry("windowed_gate_gradient", dg, parts, parts)),
    )
    return dg
