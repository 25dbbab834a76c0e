"""Rows of state pools, as device functions: which row a sequence has, and where a tile of its state lies."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slot_of(slots, n):
    """The pool's row (int64) of sequence n."""
    if slots is None:
        return n.to(tl.int64)
    return tl.load(slots + n).to(tl.int64)


@triton.jit
def instead(slot):
    """What the output of a sequence holds that has no row: zeros for slot -1, NaN for any other outside of the pool."""
    return tl.where(slot == -1, 0.0, float("nan"))


@triton.jit
def pool_tile(
    pool, slot, head, key, value,               # [P, H, K, V]; the tile's first key and value column
    stride_p, stride_h, stride_k, stride_v,     # of pool
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):
    """Addresses and mask of a [BK, BV] tile of one head's state."""
    i = key + tl.arange(0, BK)[:, None]
    j = value + tl.arange(0, BV)[None, :]
    at = pool + slot * stride_p + head.to(tl.int64) * stride_h + i.to(tl.int64) * stride_k + j.to(tl.int64) * stride_v
    return at, (i < K) & (j < V)
