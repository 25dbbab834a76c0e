"""The recurrent form: one program steps through a sequence and holds the whole [K, BV] state, in float32.

    S' = exp(g_t) S_{t-1},    u_t = beta_t (v_t - S'^T k_t),    S_t = S' + k_t u_t^T,    o_t = scale S_t^T q_t

Its gradient is the chunk form's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fla_ops import launch
from fla_ops.common.gpu.arguments import (
    WIDEST,
    contiguous,
    final_state,
    refuse_float64,
    refuse_width,
)
from fla_ops.common.gpu.chunk_index import sequence_bounds
from fla_ops.common.gpu.decay import LOG2E, advance, factor
from fla_ops.common.gpu.tiles import nearest, split_program, state_tile

from .. import checks
from ..call import Call
from .chunks import decay_of
from .products import normalized


@triton.jit
def changed(state, keys, values, strength, log_decay, DECAY: tl.constexpr):
    """The state [BK, BV] after one step, and nothing rounded between decay and change."""
    decay, rest = factor(log_decay)
    held = tl.sum(state * keys[:, None], 0)
    change = strength * (values - (held if DECAY == "none" else held * decay + held * rest))
    return advance(state, decay, rest, keys[:, None] * change[None, :], DECAY)


@triton.jit(do_not_specialize=["T"])
def delta_recurrent_kernel(
    q, k, v, g, beta,           # [B, T, HK, K] x 2, [B, T, H, V], [B, T, H] x 2
    initial, o, final,          # [N, H, K, V] or TRANSPOSED [N, H, V, K], [B, T, H, V], as initial
    scale,
    cu_seqlens,                 # [N + 1]
    T,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, NORMALIZE: tl.constexpr, TRANSPOSED: tl.constexpr,
):
    n, head, block = split_program((V + BV - 1) // BV, H)
    start, length = sequence_bounds(n, cu_seqlens, T)
    key, value = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_key, in_value = key < K, value < V
    q += head // (H // HK) * K + key
    k += head // (H // HK) * K + key

    state = tl.zeros([BK, BV], tl.float32)
    at, inside = state_tile(n * H + head, 0, block * BV, K, V, BK, BV, TRANSPOSED)
    if initial is not None:
        state += tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    for i in range(length):
        t = start + i
        keys = normalized(tl.load(k + t * (HK * K), mask=in_key, other=0.0), NORMALIZE)
        queries = normalized(tl.load(q + t * (HK * K), mask=in_key, other=0.0), NORMALIZE)
        at_value = (t * H + head) * V + value
        values = tl.load(v + at_value, mask=in_value, other=0.0).to(tl.float32)
        strength = tl.load(beta + t * H + head).to(tl.float32)
        log_decay = 0.0
        if DECAY == "step":
            log_decay = tl.load(g + t * H + head).to(tl.float32) * LOG2E
        state = changed(state, keys, values, strength, log_decay, DECAY)
        out = tl.sum(state * queries[:, None], 0) * scale
        tl.store(o + at_value, nearest(out, o.dtype.element_ty), mask=in_value)
    if final is not None:
        tl.store(final + at, state, mask=inside)


def forward(c: Call):
    """o [B, T, H, V] in v's dtype, and the final state in float32 or None."""
    checks.eager(c)
    refuse_float64(c.q)
    refuse_width("K", c.q.shape[3])
    c = contiguous(c)
    (_, time, key_heads, key_width), (heads, value_width) = c.q.shape, c.v.shape[2:]
    final = final_state(c)
    o = torch.empty(c.v.shape, dtype=c.v.dtype, device=c.v.device)
    entry = launch.entry("delta_recurrent", c.q, key_width, value_width)
    value_block = min(entry["BV"], triton.next_power_of_2(value_width))
    launch.run(
        delta_recurrent_kernel,
        c.sequences * heads * triton.cdiv(value_width, value_block),
        c.q, c.k, c.v, c.g, c.beta, c.initial_state, o, final, c.factor, c.cu_seqlens, time,
        H=heads, HK=key_heads, K=key_width, V=value_width, BK=launch.block(WIDEST, key_width), BV=value_block,
        DECAY=decay_of(c), NORMALIZE=c.use_qk_l2norm_in_kernel, TRANSPOSED=c.state_v_first, **launch.options(entry),
    )
    return o, final
