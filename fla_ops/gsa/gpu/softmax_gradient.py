"""The gradient of a softmax over slots, and what it leaves for their gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.tiles import load_rows, split_program, store_rows

from .products import softmax_argument


@triton.jit(do_not_specialize=["rows"])
def softmax_gradient_kernel(
    earlier, own, dearlier, down, s,        # [B, T, HQ, M], [B, T, HQ], [B, T, HQ, M], [B, T, HQ], [B, T, H, M]
    p, dx, reads,                           # [B, T, HQ, M] x 2, [B, T, H, M]
    scale, rows,                            # of dx; B * T
    H: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
):
    """With x = earlier + own s and dp = dearlier + down s:

    p = softmax(x),   dx = scale p (dp - <p, dp>),   reads = p dearlier + earlier dx
    """
    HQ: tl.constexpr = H * GROUP
    block, head, _ = split_program(1, H)
    first = block * BT
    steps = rows - first
    t = tl.arange(0, BT)
    s += head * M
    slots = load_rows(s, first, steps, 0, H, M, BT, BM).to(tl.float32)
    total = tl.zeros([BT, BM], tl.float32)
    for j in range(GROUP):
        query = head * GROUP + j
        self = tl.load(own + (first + t) * HQ + query, mask=t < steps, other=0.0)
        x = softmax_argument(earlier + query * M, s, self, first, steps, 0, H, HQ, M, BT, BM)
        weights = tl.exp(x - tl.max(x, 1)[:, None])
        weights /= tl.sum(weights, 1)[:, None]
        arriving = load_rows(dearlier + query * M, first, steps, 0, HQ, M, BT, BM)
        dself = tl.load(down + (first + t) * HQ + query, mask=t < steps, other=0.0)
        dweights = arriving + dself[:, None] * slots
        dargument = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
        total += weights * arriving + dargument * load_rows(earlier + query * M, first, steps, 0, HQ, M, BT, BM)
        tl.debug_barrier()  # dx may lie in the memory of dearlier, of which several threads may hold an element
        store_rows(p + query * M, weights, first, steps, 0, HQ, M, BT, BM)
        store_rows(dx + query * M, dargument * scale, first, steps, 0, HQ, M, BT, BM)
    if reads is not None:
        store_rows(reads + head * M, total, first, steps, 0, H, M, BT, BM)


def softmax_gradient(
    argument: tuple[Tensor, Tensor], dargument: tuple[Tensor, Tensor], s: Tensor, scale: float, need_reads: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """p and dx [B, T, HQ, M] and, if needed, what each step reads from earlier ones times its gradient, [B, T, H, M];
    all float32.

    `argument` and `dargument` are the strictly causal part and the diagonal of x and of dp. dx holds the scale of what
    it is multiplied with; it takes the memory of dp's strictly causal part.
    """
    (earlier, own), (dearlier, down) = argument, dargument
    batch, time, heads, slots = s.shape
    p, dx = torch.empty_like(earlier), dearlier
    reads = torch.empty(s.shape, dtype=torch.float32, device=s.device) if need_reads else None
    entry = launch.entry("softmax_gradient", s, slots, slots)
    launch.run(
        softmax_gradient_kernel,
        triton.cdiv(batch * time, entry["BT"]) * heads,
        earlier, own, dearlier, down, s, p, dx, reads, scale, batch * time,
        H=heads, GROUP=earlier.shape[2] // heads, M=slots,
        BT=entry["BT"], BM=triton.next_power_of_2(slots), **launch.options(entry),
    )
    return p, dx, reads
