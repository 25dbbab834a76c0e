"""The gradient of a query or key as it was given, from that of what each of its value heads used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.heads import group_sum
from fla_ops.common.gpu.tiles import nearest


@triton.jit(do_not_specialize=["rows"])
def delta_normalization_kernel(
    x, dx, y,                   # [rows, K], [rows, GROUP, K], [rows, K]
    rows,
    GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):
    """y = sum dx - x (x . sum dx) / |x|^2, where dx has the factor 1 / |x| in it."""
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    column = tl.arange(0, BK)[None, :]
    inside = (row < rows) & (column < K)
    given = tl.load(x + row * K + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BT, BK], tl.float32)
    for i in range(GROUP):
        total += tl.load(dx + (row * GROUP + i) * K + column, mask=inside, other=0.0)
    along = tl.sum(given * total, 1) / (tl.sum(given * given, 1) + 1e-6)
    tl.store(y + row * K + column, nearest(total - given * along[:, None], y.dtype.element_ty), mask=inside)


def as_given(x: Tensor, dx: Tensor, normalized: bool) -> Tensor:
    """The gradient of x [B, T, HK, K] from dx [B, T, H, K], in x's dtype; in float32 where x was normalized."""
    if not normalized:
        return group_sum(dx, x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    key_width = x.shape[3]
    rows = x.numel() // key_width
    entry = launch.entry("delta_normalization", x, key_width, key_width)
    launch.run(
        delta_normalization_kernel,
        triton.cdiv(rows, entry["BT"]),
        x, dx, y, rows,
        GROUP=dx.shape[2] // x.shape[2], K=key_width, BT=entry["BT"], BK=triton.next_power_of_2(key_width),
        **launch.options(entry),
    )
    return y
