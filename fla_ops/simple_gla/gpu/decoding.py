"""One decode step, in place: S = exp(g) S + k v^T, o = scale S^T q, for states that live in a pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fla_ops import launch
from fla_ops.common.gpu.arguments import contiguous, refuse_float64
from fla_ops.common.gpu.decay import LOG2E, advance, factor, gate
from fla_ops.common.gpu.tiles import nearest, split_program, store_back

from .. import checks
from ..call import Step


@triton.jit(do_not_specialize=["P"])
def decoding_kernel(
    q, k, v, g,                             # [N, HK, K] x 2, [N, H, V], [N, H] or [H]
    state, o, slots,                        # [P, H, K, V], [N, H, V], [N]
    stride_p, stride_h, stride_k, stride_v, # of state
    scale, P,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
):
    """Slot -1 reads nothing and gives zeros; any other slot outside the pool reads nothing and gives NaN."""
    n, head, block = split_program((V + BV - 1) // BV, H)
    value = block * BV + tl.arange(0, BV)
    in_value = value < V
    at_o = o + (n * H + head) * V + value
    slot = n
    if slots is not None:
        slot = tl.load(slots + n).to(tl.int64)
        if (slot < 0) | (slot >= P):
            nothing = tl.where(slot == -1, 0.0, float("nan"))
            tl.store(at_o, tl.zeros([BV], tl.float32) + nothing, mask=in_value)
            return
    decay, rest = 1.0, 0.0
    if DECAY == "step":
        decay, rest = factor(tl.load(g + n * H + head).to(tl.float32) * LOG2E)
    elif DECAY == "head":
        decay, rest = factor(tl.load(g + head).to(tl.float32) * LOG2E)
    values = tl.load(v + (n * H + head) * V + value, mask=in_value, other=0.0).to(tl.float32)
    at_key = (n * HK + head // (H // HK)) * K
    at_state = state + slot * stride_p + head.to(tl.int64) * stride_h
    out = tl.zeros([BV], tl.float32)
    for first in range(0, K, BK):
        key = first + tl.arange(0, BK)
        queries = tl.load(q + at_key + key, mask=key < K, other=0.0).to(tl.float32)
        keys = tl.load(k + at_key + key, mask=key < K, other=0.0).to(tl.float32)
        inside = (key < K)[:, None] & in_value[None, :]
        at = at_state + key[:, None].to(tl.int64) * stride_k + value[None, :].to(tl.int64) * stride_v
        tile = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tile = advance(tile, decay, rest, keys[:, None] * values[None, :], DECAY)
        store_back(at, tile, inside)
        out += tl.sum(tile * queries[:, None], 0)
    tl.store(at_o, nearest(out * scale, o.dtype.element_ty), mask=in_value)


def step(c: Step):
    """o [N, H, V] in v's dtype; row slots[n] of state [P, H, K, V] is updated for sequence n."""
    checks.eager_step(c)
    refuse_float64(c.q)
    c = contiguous(c, but=("state",))
    q, v, pool = c.q, c.v, c.pool
    sequences, key_heads, key_width = q.shape
    heads, value_width = v.shape[1:]
    decay = gate(c)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    entry = launch.entry("decoding", q, key_width, value_width)
    key_block, value_block = (
        min(entry[name], triton.next_power_of_2(width)) for name, width in (("BK", key_width), ("BV", value_width))
    )
    launch.run(
        decoding_kernel,
        sequences * heads * triton.cdiv(value_width, value_block),
        q, c.k, v, decay[0], pool, o, c.slots, *pool.stride(), c.factor, pool.shape[0],
        H=heads, HK=key_heads, K=key_width, V=value_width, BK=key_block, BV=value_block,
        DECAY=decay[1], **launch.options(entry),
    )
    return o
