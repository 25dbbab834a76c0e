"""Tiles of activations and states, as device functions. What lies outside reads as zero and is never written."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def split_program(BLOCKS: tl.constexpr, H: tl.constexpr):
    """Row (int64), head and block of this program; the block varies fastest."""
    program = tl.program_id(0).to(tl.int64)
    return program // (BLOCKS * H), (program // BLOCKS % H).to(tl.int32), (program % BLOCKS).to(tl.int32)


@triton.jit
def nearest(x, dtype: tl.constexpr):
    """float32 x in dtype, rounded to nearest as a GPU does; the interpreter would cut bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = tl.where(x == 0, x, (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True))
    return x.to(dtype)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b, accumulated in float32. PRECISION is that of float32 operands: "ieee", or "tf32x3", which is as accurate."""
    if INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_state(a, state, PRECISION: tl.constexpr):
    """a state, for a state that was kept in a's dtype, or in float32 beside float16: a sum over many steps may be out
    of float16's range. tf32 has as many digits as float16, and float32's range.
    """
    if a.dtype == tl.float16:
        return dot(a.to(tl.float32), state, "tf32")
    else:
        return dot(a, state, PRECISION)


@triton.jit
def store_back(at, tile, mask):
    """Store where the program loaded from. A tile with fewer elements than the program has threads is held by several
    of them: all must have loaded before one stores.
    """
    tl.debug_barrier()
    tl.store(at, nearest(tile, at.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(
    x,                          # at one head of [time, HEADS, WIDTH]
    first, steps, column,       # the tile's first step (int64), how many steps it has, its first column
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
):
    """[BT, BW] in x's dtype."""
    t = tl.arange(0, BT)[:, None]
    c = column + tl.arange(0, BW)[None, :]
    return tl.load(x + first * (HEADS * WIDTH) + t * (HEADS * WIDTH) + c, mask=(t < steps) & (c < WIDTH), other=0.0)


@triton.jit
def store_rows(
    x, tile,                    # at one head of [time, HEADS, WIDTH]; [BT, BW]
    first, steps, column,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
):
    t = tl.arange(0, BT)[:, None]
    c = column + tl.arange(0, BW)[None, :]
    at = x + first * (HEADS * WIDTH) + t * (HEADS * WIDTH) + c
    tl.store(at, nearest(tile, x.dtype.element_ty), mask=(t < steps) & (c < WIDTH))


@triton.jit
def state_tile(
    matrix,                     # which of the [K, V] matrices (int64)
    key, value,                 # the tile's first key and value column
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TRANSPOSED: tl.constexpr,
):
    """Offsets and mask of a [BK, BV] tile; TRANSPOSED matrices are stored as [V, K]."""
    i = key + tl.arange(0, BK)[:, None]
    j = value + tl.arange(0, BV)[None, :]
    inside = (i < K) & (j < V)
    return matrix * (K * V) + (j * K + i if TRANSPOSED else i * V + j), inside
