"""The normalisation on a GPU: y_t = o_t / d_t with d_t = scale q_t . z_t + 1e-10, z_t the running sum of k.

The sum of each chunk, then the sums before each chunk (one walk over sums, not over steps), then all chunks at once.
With w_t = -scale (dy_t . y_t) / d_t the gradients are do_t = dy_t / d_t, dq_t = w_t z_t, dk_s = sum_{t >= s} w_t q_t:
the same passes in the other direction. All arithmetic is float32. REVERSE runs time backwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import contiguous, refuse_float64
from fla_ops.common.gpu.chunk_index import ChunkIndex, first_row, locate_chunk, sequence_bounds
from fla_ops.common.gpu.heads import group_sum, per_value_head
from fla_ops.common.gpu.tiles import load_rows, nearest, split_program, store_back, store_rows

from .. import checks
from ..call import Need, Normalize, Normalized, NormalizeStep

EPSILON = tl.constexpr(1e-10)


@triton.jit
def load_weighted(
    x, weight, first, steps, key, head,     # [time, HK, K] at one head, [time, H]
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):
    """x_t, or w_t x_t, as a float32 tile [BT, BK]."""
    tile = load_rows(x, first, steps, key, HK, K, BT, BK).to(tl.float32)
    if weight is not None:
        t = tl.arange(0, BT)
        tile *= tl.load(weight + (first + t) * H + head, mask=t < steps, other=0.0)[:, None]
    return tile


@triton.jit
def load_sum(sums, row, head, key, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """[BK] of [rows, H, K]."""
    i = key + tl.arange(0, BK)
    return tl.load(sums + (row * H + head) * K + i, mask=i < K, other=0.0)


@triton.jit(do_not_specialize=["T", "N"])
def chunk_sum_kernel(
    x, weight, sums,                            # [B, T, HK, K], [B, T, H], [rows, H, K]
    cu_seqlens, chunk_sequence, chunk_ends,     # [N + 1], [rows], [N]
    T, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):
    """What each chunk adds to the running sum."""
    row, head, block = split_program((K + BK - 1) // BK, H)
    start, length, c = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps = start + c * BT, length - c * BT
    if steps > 0:
        tile = load_weighted(x + head // (H // HK) * K, weight, first, steps, block * BK, head, H, HK, K, BT, BK)
        i = block * BK + tl.arange(0, BK)
        tl.store(sums + (row * H + head) * K + i, tl.sum(tile, 0), mask=i < K)


@triton.jit(do_not_specialize=["T"])
def chunk_scan_kernel(
    sums, initial, before, final,               # [rows, H, K], [N, H, K], [rows, H, K], [N, H, K]
    cu_seqlens, chunk_ends,                     # [N + 1], [N]
    T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, REVERSE: tl.constexpr,
):
    """The sum before each chunk of one sequence, BR chunks at a time."""
    n, head, block = split_program((K + BK - 1) // BK, H)
    _, length = sequence_bounds(n, cu_seqlens, T)
    chunks = tl.cdiv(length, BT)
    row = first_row(n, chunk_ends, T, BT)
    key = block * BK + tl.arange(0, BK)
    carried = tl.zeros([BK], tl.float32)
    if initial is not None:
        carried += tl.load(initial + (n * H + head) * K + key, mask=key < K, other=0.0).to(tl.float32)
    for c in range(0, chunks, BR):
        i = (c + tl.arange(0, BR))[:, None]
        at = ((row + (chunks - 1 - i if REVERSE else i)) * H + head) * K + key[None, :]
        at_last = at + H * K if REVERSE else at - H * K  # of the chunk that was walked last
        inside = (i < chunks) & (key < K)[None, :]
        added = tl.load(sums + at_last, mask=inside & (i > c), other=0.0)
        tl.store(before + at, carried[None, :] + tl.cumsum(added, 0), mask=inside)
        carried += tl.sum(tl.load(sums + at, mask=inside, other=0.0), 0)
    if final is not None:
        tl.store(final + (n * H + head) * K + key, nearest(carried, final.dtype.element_ty), mask=key < K)


@triton.jit
def denominator(
    q, k, before, row, head, first, steps, scale,   # [time, HK, K] x 2 at one head, [rows, H, K]
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, REVERSE: tl.constexpr,
):
    """d_t of the chunk in this row, [BT]."""
    product = tl.zeros([BT], tl.float32)
    for key in range(0, K, BK):
        keys = load_rows(k, first, steps, key, HK, K, BT, BK).to(tl.float32)
        sums = tl.cumsum(keys, 0, reverse=REVERSE) + load_sum(before, row, head, key, H, K, BK)[None, :]
        product += tl.sum(load_rows(q, first, steps, key, HK, K, BT, BK) * sums, 1)
    return scale * product + EPSILON


@triton.jit(do_not_specialize=["T", "N"])
def divide_kernel(
    q, k, o, before, y,                         # [B, T, HK, K] x 2, [B, T, H, V], [rows, H, K], [B, T, H, V]
    cu_seqlens, chunk_sequence, chunk_ends,     # [N + 1], [rows], [N]
    scale, T, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
):
    row, head, _ = split_program(1, H)
    start, length, c = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps = start + c * BT, length - c * BT
    q += head // (H // HK) * K
    k += head // (H // HK) * K
    if steps > 0:
        d = denominator(q, k, before, row, head, first, steps, scale, H, HK, K, BT, BK, REVERSE)
        for value in range(0, V, BV):
            tile = load_rows(o + head * V, first, steps, value, H, V, BT, BV).to(tl.float32)
            store_rows(y + head * V, tile / d[:, None], first, steps, value, H, V, BT, BV)


@triton.jit(do_not_specialize=["T", "N"])
def divide_backward_kernel(
    q, k, y, dy, before,                        # [B, T, HK, K] x 2, [B, T, H, V] x 2, [rows, H, K]
    dq, do, weight,                             # [B, T, H, K], [B, T, H, V], [B, T, H]
    cu_seqlens, chunk_sequence, chunk_ends,     # [N + 1], [rows], [N]
    scale, T, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
):
    row, head, _ = split_program(1, H)
    start, length, c = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps = start + c * BT, length - c * BT
    q += head // (H // HK) * K
    k += head // (H // HK) * K
    if steps > 0:
        d = denominator(q, k, before, row, head, first, steps, scale, H, HK, K, BT, BK, REVERSE)
        along = tl.zeros([BT], tl.float32)
        for value in range(0, V, BV):
            arriving = load_rows(dy + head * V, first, steps, value, H, V, BT, BV).to(tl.float32)
            along += tl.sum(arriving * load_rows(y + head * V, first, steps, value, H, V, BT, BV), 1)
            if do is not None:
                store_rows(do + head * V, arriving / d[:, None], first, steps, value, H, V, BT, BV)
        w = -scale * along / d
        if weight is not None:
            t = tl.arange(0, BT)
            tl.store(weight + (first + t) * H + head, w, mask=t < steps)
        if dq is not None:
            for key in range(0, K, BK):
                keys = load_rows(k, first, steps, key, HK, K, BT, BK).to(tl.float32)
                sums = tl.cumsum(keys, 0, reverse=REVERSE) + load_sum(before, row, head, key, H, K, BK)[None, :]
                store_rows(dq + head * K, w[:, None] * sums, first, steps, key, H, K, BT, BK)


@triton.jit(do_not_specialize=["T", "N"])
def running_sum_kernel(
    x, weight, before, y,                       # [B, T, HK, K], [B, T, H], [rows, H, K], [B, T, H, K]
    cu_seqlens, chunk_sequence, chunk_ends,     # [N + 1], [rows], [N]
    T, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, REVERSE: tl.constexpr,
):
    """The running sum of w_t x_t, from what enters each chunk."""
    row, head, block = split_program((K + BK - 1) // BK, H)
    start, length, c = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps = start + c * BT, length - c * BT
    if steps > 0:
        tile = load_weighted(x + head // (H // HK) * K, weight, first, steps, block * BK, head, H, HK, K, BT, BK)
        sums = tl.cumsum(tile, 0, reverse=REVERSE) + load_sum(before, row, head, block * BK, H, K, BK)[None, :]
        store_rows(y + head * K, sums, first, steps, block * BK, H, K, BT, BK)


@triton.jit(do_not_specialize=["P"])
def normalize_step_kernel(
    q, k, o,                                    # [N, HK, K] x 2, [N, H, V]
    z, y, slots,                                # [P, 1, H, K], [N, H, V], [N]
    stride_p, stride_h, stride_k,               # of z
    scale, P,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):
    """Slot -1 reads nothing and gives zeros; any other slot outside the pool reads nothing and gives NaN."""
    n, head, _ = split_program(1, H)
    slot = n
    outside = 0.0
    used = True
    if slots is not None:
        slot = tl.load(slots + n).to(tl.int64)
        used = (slot >= 0) & (slot < P)
        outside = tl.where(slot == -1, 0.0, float("nan"))
    at_key = (n * HK + head // (H // HK)) * K
    at_z = z + slot * stride_p + head.to(tl.int64) * stride_h
    product = tl.zeros([BK], tl.float32)
    for first in range(0, K, BK):
        key = first + tl.arange(0, BK)
        inside = (key < K) & used
        keys = tl.load(k + at_key + key, mask=inside, other=0.0).to(tl.float32)
        sums = tl.load(at_z + key.to(tl.int64) * stride_k, mask=inside, other=0.0).to(tl.float32) + keys
        store_back(at_z + key.to(tl.int64) * stride_k, sums, inside)
        product += sums * tl.load(q + at_key + key, mask=inside, other=0.0)
    d = scale * tl.sum(product, 0) + EPSILON
    for first in range(0, V, BV):
        value = first + tl.arange(0, BV)
        at = (n * H + head) * V + value
        tile = tl.load(o + at, mask=(value < V) & used, other=0.0).to(tl.float32) / d
        tl.store(y + at, nearest(tl.where(used, tile, outside), y.dtype.element_ty), mask=value < V)


def forward(c: Normalize):
    """y [B, T, H, V] in o's dtype, and the last z [N, 1, H, K] in float32 or None."""
    checks.eager(c)
    refuse_float64(c.q)
    c = contiguous(c)
    q, k, o, cu_seqlens = c.q, c.k, c.o, c.cu_seqlens
    index, heads = _index(c), o.shape[2]
    final = None
    if c.output_final_z:
        final = torch.empty((c.sequences, 1, heads, q.shape[3]), dtype=torch.float32, device=o.device)
    before = _before(index, c, k, heads, initial=c.initial_z, final=final)
    y = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    entry = launch.entry("divide", q, q.shape[3], o.shape[3])
    launch.run(
        divide_kernel, index.rows * heads,
        q, k, o, before, y, cu_seqlens, index.sequence, index.ends, c.factor, q.shape[1], c.sequences,
        **_constants(index, q, o, entry), REVERSE=c.reverse, **launch.options(entry),
    )
    return y, final


def backward(c: Normalize, d: Normalized, need: Need, saved: Normalized):
    """The gradients that are needed, each in its input's dtype."""
    c, d, saved = contiguous(c), contiguous(d), contiguous(saved)
    q, k, y, dy = c.q, c.k, saved.normalized, d.normalized
    index, heads = _index(c), y.shape[2]
    dq = dk = do = weight = dinitial = None
    before = _before(index, c, k, heads, initial=c.initial_z)
    if need.q:
        dq = per_value_head(q, heads)
    if need.o:
        do = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if need.k or need.initial_z:
        weight = torch.empty(y.shape[:3], dtype=torch.float32, device=y.device)
    entry = launch.entry("divide_backward", q, q.shape[3], y.shape[3])
    sizes, rows = (q.shape[1], c.sequences), (c.cu_seqlens, index.sequence, index.ends)
    launch.run(
        divide_backward_kernel, index.rows * heads,
        q, k, y, dy, before, dq, do, weight, *rows, c.factor, *sizes,
        **_constants(index, q, y, entry), REVERSE=c.reverse, **launch.options(entry),
    )
    if need.initial_z:
        dinitial = torch.empty(c.initial_z.shape, dtype=c.initial_z.dtype, device=y.device)
    if need.k or need.initial_z:
        turned = c._replace(reverse=not c.reverse)
        after = _before(index, turned, q, heads, weight=weight, initial=d.final_z, final=dinitial)
    if need.k:
        dk = per_value_head(k, heads)
        entry = launch.entry("running_sum", q, q.shape[3], q.shape[3])
        key_block = launch.block(entry["BK"], q.shape[3])
        launch.run(
            running_sum_kernel, index.rows * heads * triton.cdiv(q.shape[3], key_block),
            q, weight, after, dk, *rows, *sizes,
            H=heads, HK=q.shape[2], K=q.shape[3], BT=index.size, BK=key_block,
            REVERSE=not c.reverse, **launch.options(entry),
        )
    return group_sum(dq, q) if need.q else None, group_sum(dk, k) if need.k else None, do, dinitial


def step(c: NormalizeStep):
    """y [N, H, V] in o's dtype; row slots[n] of z [P, 1, H, K] is updated for sequence n."""
    checks.eager_step(c)
    refuse_float64(c.q)
    c = contiguous(c, but=("z",))
    q, o, z = c.q, c.o, c.z
    y = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    sequences, heads, value_width = o.shape
    entry = launch.entry("normalize_step", q, q.shape[2], value_width)
    launch.run(
        normalize_step_kernel, sequences * heads,
        q, c.k, o, z, y, c.slots, z.stride(0), z.stride(2), z.stride(3), c.factor, z.shape[0],
        H=heads, HK=q.shape[1], K=q.shape[2], V=value_width,
        BK=launch.block(entry["BK"], q.shape[2]), BV=launch.block(entry["BV"], value_width), **launch.options(entry),
    )
    return y


def _index(c: Normalize) -> ChunkIndex:
    """The chunks that all kernels share."""
    size = launch.entry("chunk_sum", c.q, c.q.shape[3], c.q.shape[3])["BT"]
    return chunk_index.build(c.q.shape[0], c.q.shape[1], c.cu_seqlens, size)


def _constants(index: ChunkIndex, q: Tensor, o: Tensor, entry: launch.Entry) -> dict[str, int]:
    """Heads, widths and blocks of the kernels that divide."""
    return {
        "H": o.shape[2], "HK": q.shape[2], "K": q.shape[3], "V": o.shape[3], "BT": index.size,
        "BK": launch.block(entry["BK"], q.shape[3]), "BV": launch.block(entry["BV"], o.shape[3]),
    }


def _before(
    index: ChunkIndex,
    c: Normalize,
    x: Tensor,
    heads: int,
    weight: Tensor | None = None,
    initial: Tensor | None = None,
    final: Tensor | None = None,
) -> Tensor:
    """The sum of w_t x_t before each chunk, [rows, H, K], starting from `initial`; fills `final` where given."""
    time, (key_heads, key_width) = x.shape[1], x.shape[2:]
    sums, before = (torch.empty(index.rows, heads, key_width, dtype=torch.float32, device=x.device) for _ in range(2))
    entry = launch.entry("chunk_sum", x, key_width, key_width)
    block = launch.block(entry["BK"], key_width)
    launch.run(
        chunk_sum_kernel, index.rows * heads * triton.cdiv(key_width, block),
        x, weight, sums, c.cu_seqlens, index.sequence, index.ends, time, c.sequences,
        H=heads, HK=key_heads, K=key_width, BT=index.size, BK=block, **launch.options(entry),
    )
    entry = launch.entry("chunk_scan", x, key_width, key_width)
    block = launch.block(entry["BK"], key_width)
    launch.run(
        chunk_scan_kernel, c.sequences * heads * triton.cdiv(key_width, block),
        sums, initial, before, final, c.cu_seqlens, index.ends, time,
        H=heads, K=key_width, BT=index.size, BR=entry["BR"], BK=block, REVERSE=c.reverse, **launch.options(entry),
    )
    return before
