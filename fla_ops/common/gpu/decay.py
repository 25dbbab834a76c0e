"""Decay factors inside a block of steps, as device functions.

Log decays are converted to powers of two. A step whose decay is zero in float32 (-inf included) is a reset: it does not
enter the running sum but a running count, and a weight is zero when a reset lies between its two steps. So no infinity
meets another, no difference of two sums crosses a reset, and every exponent is masked before it is raised.

A decay that a state meets again and again is a factor in two parts: one that is near one, rounded to float32, would be
off by the same bit each time, a bias that grows with the length.

DECAY says what `g` is: "step", log decays [B, T, H]; "head", one log decay per head [H]; "none".
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
RESET = tl.constexpr(-127.0)
NEVER = tl.constexpr(float("-inf"))


def gate(c: Any) -> tuple[Tensor | None, str]:
    """The kernels' argument `g` and DECAY, from a call."""
    if c.g is not None:
        return c.g.contiguous(), "step"
    if c.g_gamma is not None:
        return c.g_gamma.contiguous(), "head"
    return None, "none"


@triton.jit
def load_log_decay(g, first, steps, head, H: tl.constexpr, BT: tl.constexpr, DECAY: tl.constexpr):
    """Exponents of two [BT] of the `steps` steps from `first`, zero past them."""
    t = tl.arange(0, BT)
    if DECAY == "step":
        log_decay = tl.load(g + (first + t) * H + head, mask=t < steps, other=0.0).to(tl.float32)
    else:
        log_decay = tl.where(t < steps, tl.load(g + head).to(tl.float32), 0.0)
    return log_decay * LOG2E


@triton.jit
def factor(log_decay):
    """2 ** log_decay in float32, and what rounding took from it, where it is near one."""
    x = log_decay * LN2
    change = x * (1 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    near = tl.abs(log_decay) < 0.25
    rounded = tl.where(near, 1 + change, tl.exp2(log_decay))
    return rounded, tl.where(near, change - (rounded - 1), 0.0)


@triton.jit
def decayed(state, log_decay, DECAY: tl.constexpr):
    """2 ** log_decay * state, for a block of steps."""
    if DECAY == "none":
        return state
    decay, rest = factor(log_decay)
    return state * decay + state * rest


@triton.jit
def advance(state, decay, rest, added, DECAY: tl.constexpr):
    """(decay + rest) * state + added, rounded together: the decay of one step may be less than half a bit of state."""
    return state + added if DECAY == "none" else state * decay + (state * rest + added)


@triton.jit
def running_sums(log_decay):
    """Running sum of the steps that are no reset, running count of those that are."""
    reset = log_decay <= RESET
    return tl.cumsum(tl.where(reset, 0.0, log_decay), 0), tl.cumsum(reset.to(tl.int32), 0)


@triton.jit
def last(x, BT: tl.constexpr):
    """x[BT - 1] as a scalar."""
    return tl.sum(tl.where(tl.arange(0, BT) == BT - 1, x, 0), 0)


@triton.jit
def exponents(sums, count, BT: tl.constexpr, REVERSE: tl.constexpr):
    """Exponents, -inf across a reset: of what enters, at each step [BT]; of each step, at the exit [BT]; of all.

    REVERSE walks backwards in time: what enters comes from the block's end.
    """
    end, resets = last(sums, BT), last(count, BT)
    from_start = tl.where(count == 0, sums, NEVER)
    to_end = tl.where(count == resets, end - sums, NEVER)
    total = tl.where(resets == 0, end, NEVER)
    if REVERSE:
        enter, leave = to_end, from_start
    else:
        enter, leave = from_start, to_end
    return enter, leave, total


@triton.jit
def causal(BT: tl.constexpr, REVERSE: tl.constexpr):
    """Which steps j [BT columns] each step i [BT rows] sees."""
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return i <= j if REVERSE else i >= j


@triton.jit
def within(sums, count, BT: tl.constexpr, REVERSE: tl.constexpr):
    """Decay between steps j and i of one block, [BT, BT], zero where i does not see j."""
    difference = sums[:, None] - sums[None, :]
    seen = causal(BT, REVERSE) & (count[:, None] == count[None, :])
    return tl.exp2(tl.where(seen, -difference if REVERSE else difference, NEVER))


@triton.jit
def block_decay(
    g, first, steps, head,
    H: tl.constexpr, BT: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
):
    """Factors of one block of steps, in walking order.

    Of step j, at step i [BT, BT]; of what enters, at step i [BT]; of step j, at the exit [BT]; of what enters, there,
    as an exponent.
    """
    if DECAY == "none":
        between = tl.where(causal(BT, REVERSE), 1.0, 0.0)
        enter = tl.full([BT], 1.0, tl.float32)
        leave, log_total = enter, 0.0
    else:
        sums, count = running_sums(load_log_decay(g, first, steps, head, H, BT, DECAY))
        log_enter, log_leave, log_total = exponents(sums, count, BT, REVERSE)
        between = within(sums, count, BT, REVERSE)
        enter, leave = tl.exp2(log_enter), tl.exp2(log_leave)
    return between, enter, leave, log_total
