"""One decode step of the convolution on a GPU, in place: the pool's rows move on by one step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fla_ops import launch
from fla_ops.common.gpu.arguments import contiguous, refuse_float64
from fla_ops.common.gpu.tiles import nearest, split_program, store_back

from .. import checks
from ..call import Step


@triton.jit(do_not_specialize=["P"])
def conv_step_kernel(
    x, state, weight, bias, o, slots,           # [N, D], [P, D, S], [D, W], [D], [N, D], [N]
    stride_p, stride_d, stride_s,               # of state
    P,
    D: tl.constexpr, W: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, SILU: tl.constexpr,
):
    """Slot -1 reads nothing and gives zeros; any other slot outside the pool reads nothing and gives NaN."""
    n, _, block = split_program((D + BD - 1) // BD, 1)
    d, s = block * BD + tl.arange(0, BD), tl.arange(0, BS)
    at_o = o + n * D + d
    slot = n
    if slots is not None:
        slot = tl.load(slots + n).to(tl.int64)
        if (slot < 0) | (slot >= P):
            nothing = tl.where(slot == -1, 0.0, float("nan"))
            tl.store(at_o, tl.zeros([BD], tl.float32) + nothing, mask=d < D)
            return
    newest = tl.load(x + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    out = newest * tl.load(weight + d * W + (W - 1), mask=d < D, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    if S > 0:
        at = state + slot * stride_p + d[:, None].to(tl.int64) * stride_d + s[None, :].to(tl.int64) * stride_s
        inside = (d < D)[:, None] & (s < S)[None, :]
        if W > 1:
            tap = s - (S - W + 1)
            seen = inside & (tap >= 0)[None, :]
            taps = tl.load(weight + d[:, None] * W + tap[None, :], mask=seen, other=0.0).to(tl.float32)
            out += tl.sum(tl.load(at, mask=seen, other=0.0).to(tl.float32) * taps, 1)
        moved = tl.load(at + stride_s, mask=inside & (s < S - 1)[None, :], other=0.0).to(tl.float32)
        store_back(at, tl.where((s == S - 1)[None, :], newest[:, None], moved), inside)
    if SILU:
        out *= tl.sigmoid(out)
    tl.store(at_o, nearest(out, o.dtype.element_ty), mask=d < D)


def step(c: Step):
    """o [N, D] in x's dtype; row slots[n] of state [P, D, S] is updated for sequence n."""
    checks.eager_step(c)
    refuse_float64(c.x, "x")
    c = contiguous(c, but=("state",))
    x, state = c.x, c.state
    (channels, taps), held = c.weight.shape, state.shape[2]
    o = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    entry = launch.entry("conv_step", x, taps, channels)
    block = launch.block(entry["BD"], channels)
    launch.run(
        conv_step_kernel, x.shape[0] * triton.cdiv(channels, block),
        x, state, c.weight, c.bias, o, c.slots, *state.stride(), state.shape[0],
        D=channels, W=taps, S=held, BD=block, BS=triton.next_power_of_2(max(held, 1)), SILU=c.activation is not None,
        **launch.options(entry),
    )
    return o
