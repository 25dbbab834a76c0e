"""Steps taken into rows of a pool without outputs: S = exp(g_t) S + k_t v_t^T for the first few of the steps given."""

from __future__ import annotations

import triton
import triton.language as tl

from fla_ops import launch
from fla_ops.common.gpu.arguments import contiguous, refuse_float64
from fla_ops.common.gpu.decay import LOG2E, factor, gate
from fla_ops.common.gpu.decay import advance as advanced
from fla_ops.common.gpu.tiles import split_program, store_back

from .. import checks
from ..call import Advance
from .pools import pool_tile, slot_of


@triton.jit(do_not_specialize=["T", "P"])
def advance_kernel(
    k, v, g,                                    # [N, T, HK, K], [N, T, H, V], [N, T, H] or [H]
    state, accepted, slots,                     # [P, H, K, V], [N], [N]
    stride_p, stride_h, stride_k, stride_v,     # of state
    T, P,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
):
    """One program holds one [BK, BV] tile of one head. A slot outside of the pool, -1 too, is left alone."""
    VALUE_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    KEY_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    n, head, block = split_program(KEY_BLOCKS * VALUE_BLOCKS, H)
    first_key, first_value = block // VALUE_BLOCKS * BK, block % VALUE_BLOCKS * BV
    slot = slot_of(slots, n)
    steps = tl.minimum(tl.load(accepted + n).to(tl.int32), T)
    if (slot < 0) | (slot >= P) | (steps <= 0):
        return
    key, value = first_key + tl.arange(0, BK), first_value + tl.arange(0, BV)
    at, inside = pool_tile(
        state, slot, head, first_key, first_value, stride_p, stride_h, stride_k, stride_v, K, V, BK, BV
    )
    tile = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    decay, rest = 1.0, 0.0
    if DECAY == "head":
        decay, rest = factor(tl.load(g + head).to(tl.float32) * LOG2E)
    for step in range(steps):
        t = n * T + step
        if DECAY == "step":
            decay, rest = factor(tl.load(g + t * H + head).to(tl.float32) * LOG2E)
        keys = tl.load(k + (t * HK + head // (H // HK)) * K + key, mask=key < K, other=0.0).to(tl.float32)
        values = tl.load(v + (t * H + head) * V + value, mask=value < V, other=0.0).to(tl.float32)
        tile = advanced(tile, decay, rest, keys[:, None] * values[None, :], DECAY)
    store_back(at, tile, inside)


def advance(c: Advance) -> None:
    """Row slots[n] of the pool takes the first accepted[n] steps of sequence n; more than T count as T."""
    checks.eager_advance(c)
    refuse_float64(c.k)
    c = contiguous(c, but=("state",))
    (sequences, time, key_heads, key_width), (heads, value_width) = c.k.shape, c.v.shape[2:]
    decay, pool = gate(c), c.pool
    entry = launch.entry("decoding", c.k, key_width, value_width)
    key_block, value_block = (
        min(entry[name], triton.next_power_of_2(width)) for name, width in (("BK", key_width), ("BV", value_width))
    )
    launch.run(
        advance_kernel,
        sequences * heads * triton.cdiv(key_width, key_block) * triton.cdiv(value_width, value_block),
        c.k, c.v, decay[0], pool, c.accepted, c.slots, *pool.stride(), time, pool.shape[0],
        H=heads, HK=key_heads, K=key_width, V=value_width, BK=key_block, BV=value_block,
        DECAY=decay[1], **launch.options(entry),
    )
