"""Sums over the value heads that share a query/key head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch

from .tiles import nearest


@triton.jit(do_not_specialize=["rows"])
def group_sum_kernel(
    x, y,                       # [rows, GROUP, WIDTH], [rows, WIDTH]
    rows,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows.to(tl.int64) * WIDTH
    x += at // WIDTH * (GROUP * WIDTH) + at % WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(GROUP):
        total += tl.load(x + i * WIDTH, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, nearest(total, y.dtype.element_ty), mask=inside)


def per_value_head(x: Tensor, heads: int, exact: bool = False) -> Tensor:
    """A buffer for the gradient of x [B, T, HK, D] from each of `heads` heads, float32 where it is used further."""
    shape = (*x.shape[:2], heads, x.shape[3])
    return torch.empty(shape, dtype=torch.float32 if exact or heads > x.shape[2] else x.dtype, device=x.device)


def group_sum(y: Tensor, like: Tensor) -> Tensor:
    """[B, T, H, D] summed over the H // HK heads of each of like's HK heads, in like's dtype, in one fixed order."""
    group = y.shape[2] // like.shape[2]
    if group == 1:
        return y.to(like.dtype)
    x = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    entry = launch.entry("group_sum", like, like.shape[3], like.shape[3])
    launch.run(
        group_sum_kernel, triton.cdiv(x.numel(), entry["BLOCK"]), y, x, x.numel() // like.shape[3],
        GROUP=group, WIDTH=like.shape[3], BLOCK=entry["BLOCK"], **launch.options(entry),
    )
    return x
