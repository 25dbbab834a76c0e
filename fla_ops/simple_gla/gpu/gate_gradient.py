"""The gradient of scalar gates from those of queries and keys.

    dg_t = sum_{s >= t} (q_s . dq_s - k_s . dk_s)

over one sequence, or over the rest of a chunk plus <S, dS> at its end, where that is known: then no rounding adds up
along the sequence. With REVERSE the sequence ran backwards in time: the sum runs over s <= t, and a chunk ends at its
first step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.chunk_index import ChunkIndex, first_row, sequence_bounds
from fla_ops.common.gpu.gates import RESET, load_log_decay
from fla_ops.common.gpu.tiles import load_rows, nearest, split_program


@triton.jit(do_not_specialize=["T"])
def gate_gradient_kernel(
    q, k, dq, dk, g,                        # [B, T, HK, K] x 2, [B, T, H, K] x 2, [B, T, H] or [H]
    ends, dg,                               # [rows, H, PARTS], [B, T, H]
    cu_seqlens, chunk_ends,                 # [N + 1], [N]
    T,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr,
):
    n, head, _ = split_program(1, H)
    start, length = sequence_bounds(n, cu_seqlens, T)
    q += head // (H // HK) * K
    k += head // (H // HK) * K
    dq += head * K
    dk += head * K

    beyond = 0.0
    row = first_row(n, chunk_ends, T, BT)
    chunks = tl.cdiv(length, BT)
    for c in range(chunks):
        i = c if REVERSE else chunks - 1 - c
        first, steps = start + i * BT, length - i * BT
        if ends is not None:
            beyond = 0.0
            for part in range(PARTS):
                beyond += tl.load(ends + ((row + i) * H + head) * PARTS + part)
        change = tl.zeros([BT], tl.float32)
        for key in range(0, K, BK):
            read = load_rows(q, first, steps, key, HK, K, BT, BK).to(tl.float32)
            written = load_rows(k, first, steps, key, HK, K, BT, BK).to(tl.float32)
            read *= load_rows(dq, first, steps, key, H, K, BT, BK)
            written *= load_rows(dk, first, steps, key, H, K, BT, BK)
            change += tl.sum(read - written, 1)
        reset = load_log_decay(g, first, steps, head, H, BT, DECAY) <= RESET
        dlog_decay = tl.where(reset, 0.0, beyond + tl.cumsum(change, 0, reverse=not REVERSE))
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
    ends: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    dtype: torch.dtype,
) -> Tensor:
    """dg [B, T, H] in `dtype`, from float32 gradients [B, T, H, K] of each value head's queries and keys.

    ends [rows, H, parts] is <S, dS> at the end of each of the index's chunks, in parts.
    """
    batch, time, heads, key_width = dq.shape
    dg = torch.empty((batch, time, heads), dtype=dtype, device=dq.device)
    entry = launch.entry("gate_gradient", q, key_width, key_width)
    launch.run(
        gate_gradient_kernel,
        (batch if cu_seqlens is None else cu_seqlens.shape[0] - 1) * heads,
        q, k, dq, dk, gate[0], ends, dg, cu_seqlens, index.ends, time,
        H=heads, HK=q.shape[2], K=key_width, BT=index.size, BK=launch.block(entry["BK"], key_width),
        PARTS=0 if ends is None else ends.shape[2], DECAY=gate[1], REVERSE=reverse, **launch.options(entry),
    )
    return dg
