"""One decode step, in place, for states that live in a pool. One program holds [K, BV] of a state: what the key reads
of it is a sum over all of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.arguments import WIDEST, contiguous, refuse_float64, refuse_width
from fla_ops.common.gpu.decay import LOG2E
from fla_ops.common.gpu.tiles import nearest, split_program, store_back

from .. import checks
from ..call import Step
from .chunks import decay_of
from .fused_recurrent import changed
from .products import normalized


@triton.jit(do_not_specialize=["P"])
def delta_decoding_kernel(
    q, k, v, g, beta,                       # [N, HK, K] x 2, [N, H, V], [N, H] x 2
    state, o, slots,                        # [P, H, K, V], [N, H, V], [N]
    stride_p, stride_h, stride_k, stride_v, # of state
    scale, P,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, NORMALIZE: tl.constexpr,
):
    """Slot -1 reads nothing and gives zeros; any other slot outside the pool reads nothing and gives NaN."""
    n, head, block = split_program((V + BV - 1) // BV, H)
    key, value = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_key, in_value = key < K, value < V
    at_value = (n * H + head) * V + value
    slot = n
    if slots is not None:
        slot = tl.load(slots + n).to(tl.int64)
        if (slot < 0) | (slot >= P):
            nothing = tl.where(slot == -1, 0.0, float("nan"))
            tl.store(o + at_value, tl.zeros([BV], tl.float32) + nothing, mask=in_value)
            return
    at_key = (n * HK + head // (H // HK)) * K + key
    keys = normalized(tl.load(k + at_key, mask=in_key, other=0.0), NORMALIZE)
    queries = normalized(tl.load(q + at_key, mask=in_key, other=0.0), NORMALIZE)
    values = tl.load(v + at_value, mask=in_value, other=0.0).to(tl.float32)
    strength = tl.load(beta + n * H + head).to(tl.float32)
    log_decay = 0.0
    if DECAY == "step":
        log_decay = tl.load(g + n * H + head).to(tl.float32) * LOG2E
    at = state + slot * stride_p + head.to(tl.int64) * stride_h
    at += key[:, None].to(tl.int64) * stride_k + value[None, :].to(tl.int64) * stride_v
    inside = in_key[:, None] & in_value[None, :]
    tile = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tile = changed(tile, keys, values, strength, log_decay, DECAY)
    store_back(at, tile, inside)
    out = tl.sum(tile * queries[:, None], 0) * scale
    tl.store(o + at_value, nearest(out, o.dtype.element_ty), mask=in_value)


def step(c: Step) -> Tensor:
    """o [N, H, V] in v's dtype; row slots[n] of state [P, H, K, V] is updated for sequence n."""
    checks.eager_step(c)
    refuse_float64(c.q)
    refuse_width("K", c.q.shape[2])
    c = contiguous(c, but=("state",))
    (sequences, key_heads, key_width), (heads, value_width), pool = c.q.shape, c.v.shape[1:], c.pool
    o = torch.empty(c.v.shape, dtype=c.v.dtype, device=c.v.device)
    entry = launch.entry("delta_decoding", c.q, key_width, value_width)
    value_block = min(entry["BV"], triton.next_power_of_2(value_width))
    launch.run(
        delta_decoding_kernel,
        sequences * heads * triton.cdiv(value_width, value_block),
        c.q, c.k, c.v, c.g, c.beta, pool, o, c.slots, *pool.stride(), c.factor, pool.shape[0],
        H=heads, HK=key_heads, K=key_width, V=value_width, BK=launch.block(WIDEST, key_width), BV=value_block,
        DECAY=decay_of(c), NORMALIZE=c.use_qk_l2norm_in_kernel, **launch.options(entry),
    )
    return o
