"""One decode step, in place, for states that live in two pools: A = A diag(exp g) + k s^T, C = diag(exp g) C + s v^T,
o = C^T softmax(scale A^T q). One program reads and writes both states of a head once, for all heads of the query group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.arguments import contiguous, refuse_float64
from fla_ops.common.gpu.tiles import split_program, store_back

from .. import checks
from ..call import Step


@triton.jit
def fill_output(
    o, value,                               # at one group of [N, HQ, V]
    GROUP: tl.constexpr, V: tl.constexpr, BG: tl.constexpr, BV: tl.constexpr,
):
    group = tl.arange(0, BG)[:, None]
    for first in range(0, V, BV):
        column = first + tl.arange(0, BV)[None, :]
        tile = tl.full([BG, BV], 0.0, tl.float32) + value
        tl.store(o + group * V + column, tile.to(o.dtype.element_ty), mask=(group < GROUP) & (column < V))


@triton.jit
def advance(
    pool, at, inside, added,                # [rows, columns] offsets, mask and what is added; `decay` in their shape
    decay,
):
    """state = decay state + added, in place; returns it in float32."""
    tile = tl.load(pool + at, mask=inside, other=0.0).to(tl.float32) * decay + added
    store_back(pool + at, tile, inside)
    return tile


@triton.jit
def product(
    left, right,                            # [rows, columns], [columns, width]
):
    """left right in float32, for any number of rows. With the operands of * exchanged, Triton would take the sum for a
    matrix product from 16 rows on, and round them to tf32.
    """
    return tl.sum(right[None, :, :] * left[:, :, None], 1)


@triton.jit(do_not_specialize=["P"])
def gsa_decoding_kernel(
    q, k, v, s, g,                          # [N, HQ, K], [N, H, K], [N, H, V], [N, H, M] x 2
    state_k, state_v, o, slots,             # [P, H, K, M], [P, H, M, V], [N, HQ, V], [N]
    kp, kh, kk, km, vp, vh, vm, vv,         # strides of the pools
    scale, P,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    BG: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
):
    """Slot -1 reads nothing and gives zeros; any other slot outside the pools reads nothing and gives NaN."""
    n, head, _ = split_program(1, H)
    row = n * H + head
    o += row * (GROUP * V)
    slot = n
    if slots is not None:
        slot = tl.load(slots + n).to(tl.int64)
        if (slot < 0) | (slot >= P):
            fill_output(o, tl.where(slot == -1, 0.0, float("nan")), GROUP, V, BG, BV)
            return
    group, m = tl.arange(0, BG), tl.arange(0, BM)
    decay = tl.exp(tl.load(g + row * M + m, mask=m < M, other=0.0).to(tl.float32))
    writes = tl.load(s + row * M + m, mask=m < M, other=0.0).to(tl.float32)
    column = m.to(tl.int64)

    x = tl.zeros([BG, BM], tl.float32)
    for first in range(0, K, BK):
        key = first + tl.arange(0, BK)
        keys = tl.load(k + row * K + key, mask=key < K, other=0.0).to(tl.float32)
        at = slot * kp + head.to(tl.int64) * kh + key[:, None].to(tl.int64) * kk + column[None, :] * km
        inside = (key < K)[:, None] & (m < M)[None, :]
        tile = advance(state_k, at, inside, keys[:, None] * writes[None, :], decay[None, :])
        reading = (group < GROUP)[:, None] & (key < K)[None, :]
        queries = tl.load(q + (row * GROUP + group[:, None]) * K + key[None, :], mask=reading, other=0.0).to(tl.float32)
        x += product(queries, tile)
    x = tl.where(m[None, :] < M, x * scale, float("-inf"))
    p = tl.exp(x - tl.max(x, 1)[:, None])
    p /= tl.sum(p, 1)[:, None]

    for first in range(0, V, BV):
        value = first + tl.arange(0, BV)
        values = tl.load(v + row * V + value, mask=value < V, other=0.0).to(tl.float32)
        at = slot * vp + head.to(tl.int64) * vh + column[:, None] * vm + value[None, :].to(tl.int64) * vv
        inside = (m < M)[:, None] & (value < V)[None, :]
        tile = advance(state_v, at, inside, writes[:, None] * values[None, :], decay[:, None])
        out = product(p, tile)
        written = (group < GROUP)[:, None] & (value < V)[None, :]
        tl.store(o + group[:, None] * V + value[None, :], out.to(o.dtype.element_ty), mask=written)


def step(c: Step) -> Tensor:
    """o [N, HQ, V] in v's dtype; row slots[n] of both pools is updated for sequence n."""
    checks.eager_step(c)
    refuse_float64(c.q)
    c = contiguous(c, but=("state_k", "state_v"))
    q, k, v, s, g = c[:5]
    state_k, state_v = c.pools
    sequences, query_heads, key_width = q.shape
    heads, value_width, slots = v.shape[1], v.shape[2], s.shape[2]
    o = torch.empty(sequences, query_heads, value_width, dtype=v.dtype, device=v.device)
    entry = launch.entry("gsa_decoding", q, max(key_width, value_width), slots)
    group, slot_block = triton.next_power_of_2(query_heads // heads), triton.next_power_of_2(slots)
    columns = max(1, entry["TILE"] // (group * slot_block))  # so that all products of one tile fit in registers
    launch.run(
        gsa_decoding_kernel,
        sequences * heads,
        q, k, v, s, g, state_k, state_v, o, c.slots, *state_k.stride(), *state_v.stride(), c.factor, state_k.shape[0],
        H=heads, GROUP=query_heads // heads, K=key_width, V=value_width, M=slots, BG=group, BM=slot_block,
        BK=min(columns, triton.next_power_of_2(key_width)), BV=min(columns, triton.next_power_of_2(value_width)),
        **launch.options(entry),
    )
    return o
