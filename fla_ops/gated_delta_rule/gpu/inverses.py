"""The triangular systems of all chunks, solved in float32.

With B_ij = D_ij (k_i . k_j) for j < i, keys as they are used, and beta the diagonal of the strengths:

    M = (I + B beta)^-1         which gives the errors,     E = M (v - exp(P) K S)
    N = (I + beta B)^-1         and their gradients,        F = N^T dU

Diagonal blocks are inverted row by row, all at once; two of them grow together by two products:

    [ X  0 ]^-1     [  X^-1             0    ]
    [ Y  Z ]     =  [ -Z^-1 Y X^-1     Z^-1  ]
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.chunk_index import locate_chunk
from fla_ops.common.gpu.decay import block_decay
from fla_ops.common.gpu.tiles import dot, load_rows, split_program

from .chunks import Chunks
from .products import at_pair, inverse_norm, load_steps, squared_norm

BLOCK = tl.constexpr(16)  # rows of a diagonal block


@triton.jit
def lower_left(x):
    """A quarter of a square tile."""
    HALF: tl.constexpr = x.shape[0] // 2
    _, lower = tl.split(tl.permute(tl.reshape(x, [2, HALF, 2, HALF]), [1, 3, 2, 0]))
    left, _ = tl.split(lower)
    return left


@triton.jit
def halves(blocks):
    """The first and the second half of blocks [COUNT, ...]."""
    HALF: tl.constexpr = blocks.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(blocks, [2, HALF, BLOCK, BLOCK]), [1, 2, 3, 0]))


@triton.jit
def grown(upper, beside, under, PRECISION: tl.constexpr):
    """The inverse of a triangle, from the inverses of its diagonal's two halves and what it has beside the second."""
    SIZE: tl.constexpr = 2 * upper.shape[0]
    corner = -dot(under, dot(beside, upper, PRECISION), PRECISION)
    rows = tl.join(tl.join(upper, tl.zeros_like(upper)), tl.join(corner, under))
    return tl.reshape(tl.permute(rows, [3, 0, 2, 1]), [SIZE, SIZE])


@triton.jit
def diagonal_inverses(lower, BT: tl.constexpr):
    """[BT / 16, 16, 16], the inverses of I + lower's diagonal blocks: row after row, of all blocks at once."""
    COUNT: tl.constexpr = BT // BLOCK
    tiles = tl.reshape(lower, [COUNT, BLOCK, COUNT, BLOCK])
    number = tl.arange(0, COUNT)
    diagonal = (number[:, None] == number[None, :])[:, None, :, None]
    columns = tl.permute(tl.sum(tl.where(diagonal, tiles, 0.0), 2), [0, 2, 1])
    i, j = tl.arange(0, BLOCK)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    inverse = tl.zeros([COUNT, BLOCK, BLOCK], tl.float32) + tl.where(i == j, 1.0, 0.0)
    for row in range(1, BLOCK):
        known = tl.sum(tl.where(j == row, columns, 0.0), 2)
        inverse -= tl.where(i == row, tl.sum(known[:, :, None] * inverse, 1)[:, None, :], 0.0)
    return inverse


@triton.jit
def unit_triangle_inverse(lower, BT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1 of a strictly lower triangle [BT, BT] in float32; BT is 16, 32 or 64."""
    inverse = diagonal_inverses(lower, BT)
    if BT == 16:
        return tl.reshape(inverse, [BT, BT])
    elif BT == 32:
        upper, under = halves(inverse)
        return grown(tl.reshape(upper, [16, 16]), lower_left(lower), tl.reshape(under, [16, 16]), PRECISION)
    else:
        upper, under = halves(inverse)
        first, second = halves(upper)
        third, fourth = halves(under)
        tiles = tl.permute(tl.reshape(lower, [2, 32, 2, 32]), [1, 3, 2, 0])
        left, right = tl.split(tiles)
        upper_lower, _ = tl.split(left)
        beside, under_lower = tl.split(right)
        upper = grown(tl.reshape(first, [16, 16]), lower_left(upper_lower), tl.reshape(second, [16, 16]), PRECISION)
        under = grown(tl.reshape(third, [16, 16]), lower_left(under_lower), tl.reshape(fourth, [16, 16]), PRECISION)
        return grown(upper, beside, under, PRECISION)


@triton.jit(do_not_specialize=["T", "N"])
def delta_inverse_kernel(
    k, g, beta,                             # [B, T, HK, K], [B, T, H] x 2
    inverse,                                # [rows, H, BT, BT]: M, or N transposed
    reads, writes, totals,                  # [B, T, H] x 2, [rows, H]; None beside N
    cu_seqlens, chunk_sequence, chunk_ends, # [N + 1], [rows], [N]
    T, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    DECAY: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):
    row, head, _ = split_program(1, H)
    start, length, i = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps = start + i * BT, length - i * BT
    if steps <= 0:
        return
    k += head // (H // HK) * K
    between_keys = tl.zeros([BT, BT], tl.float32)
    squares = tl.zeros([BT], tl.float32)
    for key in range(0, K, BK):
        keys = load_rows(k, first, steps, key, HK, K, BT, BK)
        between_keys += dot(keys, tl.trans(keys), PRECISION)
        squares += squared_norm(keys)
    norm = inverse_norm(squares, NORMALIZE)
    strength = load_steps(beta, first, steps, head, H, BT)
    decay, enter, leave, log_total = block_decay(g, first, steps, head, H, BT, DECAY, False)
    t = tl.arange(0, BT)
    between_keys = tl.where(t[:, None] > t[None, :], between_keys * decay, 0.0) * (norm[:, None] * norm[None, :])
    if reads is not None:
        tl.store(reads + (first + t) * H + head, enter * norm, mask=t < steps)
        tl.store(writes + (first + t) * H + head, leave * norm, mask=t < steps)
        tl.store(totals + row * H + head, log_total)
        found = unit_triangle_inverse(between_keys * strength[None, :], BT, PRECISION)
    else:
        found = tl.trans(unit_triangle_inverse(between_keys * strength[:, None], BT, PRECISION))
    tl.store(at_pair(inverse, row * H + head, BT), found)


class Systems(NamedTuple):
    """What a walk along the chunks takes of them, in float32. Norms of keys are in the factors."""

    inverse: Tensor  # M [rows, H, BT, BT]
    reads: Tensor  # [B, T, H]: the factor of what a key reads of the state that enters its chunk
    writes: Tensor  # [B, T, H]: the factor of what a change gives to the state that leaves its chunk
    totals: Tensor  # [rows, H]: the decay of a chunk, as an exponent of two


def systems(chunks: Chunks) -> Systems:
    """M of every chunk, and the factors of its steps."""
    pairs, steps = chunks.pairs, chunks.call.v.shape[:3]
    found = Systems(*(chunks.new(shape) for shape in (pairs, steps, steps, pairs[:2])))
    _launch(chunks, *found)
    return found


def transposed_inverses(chunks: Chunks) -> Tensor:
    """N of every chunk, transposed [rows, H, BT, BT]."""
    found = chunks.new(chunks.pairs)
    _launch(chunks, found)
    return found


def _launch(
    chunks: Chunks,
    inverse: Tensor,
    reads: Tensor | None = None,
    writes: Tensor | None = None,
    totals: Tensor | None = None,
) -> None:
    c = chunks.call
    heads, (key_heads, key_width) = c.v.shape[2], c.k.shape[2:]
    entry = launch.entry("delta_inverse", c.k, key_width, key_width)
    launch.run(
        delta_inverse_kernel,
        chunks.index.rows * heads,
        c.k, c.g, c.beta, inverse, reads, writes, totals, *chunks.by_row,
        H=heads, HK=key_heads, K=key_width, BT=chunks.index.size, BK=launch.block(entry["BK"], key_width),
        PRECISION=launch.precision(entry), **chunks.flags, **launch.options(entry),
    )
