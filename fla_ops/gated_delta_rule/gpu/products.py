"""Products of the gated delta rule's chunks, as device functions.

An error that enters the state is read by every later step, and a triangle's inverse enlarges it. So what goes along
time is multiplied with more digits than the activations have: a float32 operand beside 16-bit activations is the sum of
two in bfloat16, which has float32's range, and loses nothing above 2^-16 of itself. What comes out once, the outputs
and the gradients of q and k, takes its operands in the activations' precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla_ops.common.gpu.tiles import dot, nearest


@triton.jit
def parts(x):
    """x as a sum of two in bfloat16; exact for float16."""
    high = nearest(x.to(tl.float32), tl.bfloat16)
    return high, nearest(x.to(tl.float32) - high.to(tl.float32), tl.bfloat16)


@triton.jit
def precise_dot(a, b, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """a b, with at least 16 bits of every operand; HALF says that activations have 16 bits."""
    if not HALF or (a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16):
        return dot(a, b, PRECISION)
    elif a.dtype == tl.bfloat16:
        high, low = parts(b)
        return dot(a, low, PRECISION) + dot(a, high, PRECISION)
    elif b.dtype == tl.bfloat16:
        high, low = parts(a)
        return dot(low, b, PRECISION) + dot(high, b, PRECISION)
    else:
        high, low = parts(a)
        b_high, b_low = parts(b)
        return dot(low, b_high, PRECISION) + dot(high, b_low, PRECISION) + dot(high, b_high, PRECISION)


@triton.jit
def long_dot(a, b, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """a b for a low and wide a [BT, K]. Each warp would hold all of it: where that is too much, in float32, four
    products share its width, and are added.
    """
    ROWS: tl.constexpr = a.shape[0]
    WIDTH: tl.constexpr = a.shape[1]
    if HALF or WIDTH < 128:
        return precise_dot(a, b, HALF, PRECISION)
    else:
        a = tl.permute(tl.reshape(a, [ROWS, 4, WIDTH // 4]), [1, 0, 2])
        return tl.sum(dot(a, tl.reshape(b, [4, WIDTH // 4, b.shape[1]]), PRECISION), 0)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in dtype."""
    return x if x.dtype == dtype else nearest(x.to(tl.float32), dtype)


@triton.jit
def rounded_dot(a, b, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """a b, with operands as precise as activations of `dtype`: beside float16 in tf32, which has float32's range."""
    if dtype == tl.float16 and (a.dtype == tl.float32 or b.dtype == tl.float32):
        return dot(a.to(tl.float32), b.to(tl.float32), "tf32")
    else:
        return dot(rounded(a, dtype), rounded(b, dtype), PRECISION)


@triton.jit
def load_steps(
    x,                          # [time, H]
    first, steps, head,
    H: tl.constexpr, BT: tl.constexpr,
):
    """One number of each step in float32 [BT], zero past them."""
    t = tl.arange(0, BT)
    return tl.load(x + (first + t) * H + head, mask=t < steps, other=0.0).to(tl.float32)


@triton.jit
def inverse_norm(squares, NORMALIZE: tl.constexpr):
    """What rows with these squared norms are multiplied by."""
    return tl.rsqrt(squares + 1e-6) if NORMALIZE else tl.full(squares.shape, 1.0, tl.float32)


@triton.jit
def squared_norm(rows):
    """Of each row of a tile [BT, BK], in float32."""
    rows = rows.to(tl.float32)
    return tl.sum(rows * rows, 1)


@triton.jit
def at_pair(x, pair, BT: tl.constexpr):
    """Addresses of the [BT, BT] matrix of one chunk and head; those of its elements differ by constants."""
    return x + pair * (BT * BT) + (tl.arange(0, BT)[:, None] * BT + tl.arange(0, BT)[None, :])


@triton.jit
def normalized(row, NORMALIZE: tl.constexpr):
    """A query or key [BK] as it is used, in float32."""
    row = row.to(tl.float32)
    return row * tl.rsqrt(tl.sum(row * row, 0) + 1e-6) if NORMALIZE else row
