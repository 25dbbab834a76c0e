"""The gradient of scalar gates from those of queries and keys, where these are exact in float32.

    dg_t = sum_{s >= t} (q_s . dq_s - k_s . dk_s) + <S_T, dS_T>

over one sequence, S_T its final state. With REVERSE the sequence ran backwards in time and the sum runs over s <= t.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.chunk_index import sequence_bounds
from fla_ops.common.gates import RESET, load_log_decay
from fla_ops.common.tiles import load_rows, split_program


@triton.jit(do_not_specialize=["T"])
def gate_gradient_kernel(
    q, k, dq, dk, g,                        # [B, T, HK, K] x 2, [B, T, H, K] x 2, [B, T, H] or [H]
    final, dfinal, dg,                      # [N, H, STATE] x 2, [B, T, H]
    cu_seqlens,                             # [N + 1]
    T,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, STATE: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr,
):
    n, head, _ = split_program(1, H)
    start, length = sequence_bounds(n, cu_seqlens, T)
    q += head // (H // HK) * K
    k += head // (H // HK) * K
    dq += head * K
    dk += head * K

    beyond = 0.0
    if dfinal is not None:
        products = tl.zeros([BT * BK], tl.float32)
        for offset in range(0, STATE, BT * BK):
            element = offset + tl.arange(0, BT * BK)
            at = (n * H + head) * STATE + element
            left = tl.load(final + at, mask=element < STATE, other=0.0).to(tl.float32)
            products += left * tl.load(dfinal + at, mask=element < STATE, other=0.0).to(tl.float32)
        beyond += tl.sum(products, 0)
    chunks = tl.cdiv(length, BT)
    for c in range(chunks):
        i = c if REVERSE else chunks - 1 - c
        first, steps = start + i * BT, length - i * BT
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
        tl.store(dg + (first + t) * H + head, dlog_decay.to(dg.dtype.element_ty), mask=t < steps)
        beyond += tl.sum(change, 0)


def gate_gradient(
    q: Tensor,
    k: Tensor,
    dq: Tensor,
    dk: Tensor,
    gate: tuple[Tensor | None, str],
    final: Tensor | None,
    dfinal: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    dtype: torch.dtype,
) -> Tensor:
    """dg [B, T, H] in `dtype`, from float32 gradients [B, T, H, K] of each value head's queries and keys."""
    batch, time, heads, key_width = dq.shape
    dg = torch.empty((batch, time, heads), dtype=dtype, device=dq.device)
    entry = launch.entry("gate_gradient", q, key_width, key_width)
    launch.run(
        gate_gradient_kernel,
        (batch if cu_seqlens is None else cu_seqlens.shape[0] - 1) * heads,
        q, k, dq, dk, gate[0], final, dfinal, dg, cu_seqlens, time,
        H=heads, HK=q.shape[2], K=key_width, STATE=0 if final is None else final[0, 0].numel(),
        BT=entry["BT"], BK=launch.block(entry["BK"], key_width), DECAY=gate[1], REVERSE=reverse, **launch.options(entry),
    )
    return dg
