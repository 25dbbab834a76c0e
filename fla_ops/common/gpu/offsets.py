"""Offsets of packed sequences that no kernel can follow out of its tensors, whatever values they have.

No value is read back from a device, so wrong offsets cannot be refused there: they count as their running maximum
between 0 and T, the first one as 0 and the last one as T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch

BLOCK = 1024  # offsets at once


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["T", "N"])
def offsets_kernel(
    given, kept,        # [N + 1] x 2
    T, N,
    BLOCK: tl.constexpr,
):
    """One program for all."""
    highest = tl.zeros([], tl.int64)
    for first in range(0, N + 1, BLOCK):
        n = first + tl.arange(0, BLOCK)
        offset = tl.load(given + n, mask=n <= N, other=0).to(tl.int64)
        offset = tl.where(n == 0, 0, tl.where(n >= N, T, tl.minimum(tl.maximum(offset, 0), T)))
        offset = tl.maximum(tl.associative_scan(offset, 0, larger), highest)
        tl.store(kept + n, offset, mask=n <= N)
        highest = tl.max(offset, 0)


def followed(cu_seqlens: Tensor, time: int) -> Tensor:
    """What cu_seqlens [N + 1] counts as, in int64."""
    kept = torch.empty(cu_seqlens.shape, dtype=torch.int64, device=cu_seqlens.device)
    sizes = {"BLOCK": BLOCK, "num_warps": 4}
    launch.run(offsets_kernel, 1, cu_seqlens.contiguous(), kept, time, cu_seqlens.shape[0] - 1, **sizes)
    return kept
