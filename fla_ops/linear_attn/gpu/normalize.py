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
from fla_ops.common.gpu.arguments import check_offsets, contiguous, refuse_float64, scale_of
from fla_ops.common.gpu.chunk_index import ChunkIndex, first_row, locate_chunk, sequence_bounds
from fla_ops.common.gpu.heads import group_sum, per_value_head
from fla_ops.common.gpu.tiles import load_rows, nearest, split_program, store_back, store_rows

from .. import checks

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


def forward(q, k, o, scale, initial_z, output_final_z, reverse, cu_seqlens, cu_seqlens_cpu):
    """y [B, T, H, V] in o's dtype, and the last z [N, 1, H, K] in float32 or None."""
    checks.launch(q, k, o, initial_z, cu_seqlens, cu_seqlens_cpu)
    refuse_float64(q)
    check_offsets(cu_seqlens, q.shape[1])
    q, k, o, initial_z, cu_seqlens = contiguous(q, k, o, initial_z, cu_seqlens)
    index = _index(q, cu_seqlens)
    final = None
    if output_final_z:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        final = torch.empty((sequences, 1, o.shape[2], q.shape[3]), dtype=torch.float32, device=o.device)
    before = _before(index, k, None, o.shape[2], initial_z, final, cu_seqlens, reverse)
    y = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    entry = launch.entry("divide", q, q.shape[3], o.shape[3])
    launch.run(
        divide_kernel, index.rows * o.shape[2],
        q, k, o, before, y, cu_seqlens, index.sequence, index.ends, scale_of(q, scale), *_sizes(q, cu_seqlens),
        **_constants(index, q, o, entry), REVERSE=reverse, **launch.options(entry),
    )
    return y, final


def backward(q, k, normalized, initial_z, cu_seqlens, dnormalized, dfinal_z, scale, reverse, output_mask):
    """The gradients of q, k, o and initial_z that output_mask asks for, each in its input's dtype."""
    need_q, need_k, need_o, need_z = output_mask
    q, k, y, dy, initial_z, dfinal_z, cu_seqlens = contiguous(
        q, k, normalized, dnormalized, initial_z, dfinal_z, cu_seqlens
    )
    index, heads = _index(q, cu_seqlens), y.shape[2]
    dq = dk = do = weight = dinitial = None
    before = _before(index, k, None, heads, initial_z, None, cu_seqlens, reverse)
    if need_q:
        dq = per_value_head(q, heads)
    if need_o:
        do = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if need_k or need_z:
        weight = torch.empty(y.shape[:3], dtype=torch.float32, device=y.device)
    entry = launch.entry("divide_backward", q, q.shape[3], y.shape[3])
    sizes, rows = _sizes(q, cu_seqlens), (cu_seqlens, index.sequence, index.ends)
    launch.run(
        divide_backward_kernel, index.rows * heads,
        q, k, y, dy, before, dq, do, weight, *rows, scale_of(q, scale), *sizes,
        **_constants(index, q, y, entry), REVERSE=reverse, **launch.options(entry),
    )
    if need_z:
        dinitial = torch.empty(initial_z.shape, dtype=initial_z.dtype, device=y.device)
    if need_k or need_z:
        after = _before(index, q, weight, heads, dfinal_z, dinitial, cu_seqlens, not reverse)
    if need_k:
        dk = per_value_head(k, heads)
        entry = launch.entry("running_sum", q, q.shape[3], q.shape[3])
        key_block = launch.block(entry["BK"], q.shape[3])
        launch.run(
            running_sum_kernel, index.rows * heads * triton.cdiv(q.shape[3], key_block),
            q, weight, after, dk, *rows, *sizes,
            H=heads, HK=q.shape[2], K=q.shape[3], BT=index.size, BK=key_block,
            REVERSE=not reverse, **launch.options(entry),
        )
    return group_sum(dq, q) if need_q else None, group_sum(dk, k) if need_k else None, do, dinitial


def step(q, k, o, z, scale, slots):
    """y [N, H, V] in o's dtype; row slots[n] of z [P, 1, H, K] is updated for sequence n."""
    checks.launch_step(q, k, o, z, slots)
    refuse_float64(q)
    q, k, o, slots = contiguous(q, k, o, slots)
    y = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    sequences, heads, value_width = o.shape
    entry = launch.entry("normalize_step", q, q.shape[2], value_width)
    launch.run(
        normalize_step_kernel, sequences * heads,
        q, k, o, z, y, slots, z.stride(0), z.stride(2), z.stride(3), scale_of(q, scale), z.shape[0],
        H=heads, HK=q.shape[1], K=q.shape[2], V=value_width,
        BK=launch.block(entry["BK"], q.shape[2]), BV=launch.block(entry["BV"], value_width), **launch.options(entry),
    )
    return y


def _index(q: Tensor, cu_seqlens: Tensor | None) -> ChunkIndex:
    """The chunks that all kernels share."""
    size = launch.entry("chunk_sum", q, q.shape[3], q.shape[3])["BT"]
    return chunk_index.build(q.shape[0], q.shape[1], cu_seqlens, size)


def _sizes(q: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """T and N."""
    return q.shape[1], q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _constants(index: ChunkIndex, q: Tensor, o: Tensor, entry: launch.Entry) -> dict[str, int]:
    """Heads, widths and blocks of the kernels that divide."""
    return {
        "H": o.shape[2], "HK": q.shape[2], "K": q.shape[3], "V": o.shape[3], "BT": index.size,
        "BK": launch.block(entry["BK"], q.shape[3]), "BV": launch.block(entry["BV"], o.shape[3]),
    }


def _before(
    index: ChunkIndex,
    x: Tensor,
    weight: Tensor | None,
    heads: int,
    initial: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor:
    """The sum of w_t x_t before each chunk, [rows, H, K], starting from `initial`; fills `final` where given."""
    (time, sequences), (key_heads, key_width) = _sizes(x, cu_seqlens), x.shape[2:]
    sums, before = (torch.empty(index.rows, heads, key_width, dtype=torch.float32, device=x.device) for _ in range(2))
    entry = launch.entry("chunk_sum", x, key_width, key_width)
    block = launch.block(entry["BK"], key_width)
    launch.run(
        chunk_sum_kernel, index.rows * heads * triton.cdiv(key_width, block),
        x, weight, sums, cu_seqlens, index.sequence, index.ends, time, sequences,
        H=heads, HK=key_heads, K=key_width, BT=index.size, BK=block, **launch.options(entry),
    )
    entry = launch.entry("chunk_scan", x, key_width, key_width)
    block = launch.block(entry["BK"], key_width)
    launch.run(
        chunk_scan_kernel, sequences * heads * triton.cdiv(key_width, block),
        sums, initial, before, final, cu_seqlens, index.ends, time,
        H=heads, K=key_width, BT=index.size, BR=entry["BR"], BK=block, REVERSE=reverse, **launch.options(entry),
    )
    return before
