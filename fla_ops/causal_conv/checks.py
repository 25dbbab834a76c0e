"""What causal_conv and its decode step accept."""

from __future__ import annotations

import torch

from fla_ops import validation as valid

from .call import Call, Step

WIDEST = 8
ACTIVATIONS = (None, "silu", "swish")


def inputs(c: Call) -> valid.Sizes:
    """Raise ValueError or TypeError unless the arguments describe one call; sizes may be symbolic."""
    sizes = valid.axes(c)
    valid.same_dtype(x=c.x)
    valid.floating(weight=c.weight, bias=c.bias, initial_state=c.initial_state)
    valid.same_device(c)
    _filter(sizes, c.activation)
    return sizes


def step(c: Step) -> valid.Sizes:
    """The arguments of one decode step; sizes may be symbolic."""
    sizes = valid.axes(c)
    valid.same_dtype(x=c.x)
    valid.floating(weight=c.weight, bias=c.bias)
    valid.pools(c, "state")
    valid.same_device(c)
    _filter(sizes, c.activation)
    before, held = sizes["W-1"], sizes["S"]
    torch._check_value(held >= before, lambda: f"state must have S >= W - 1 = {before}, got S = {held}")
    return sizes


def _filter(sizes: valid.Sizes, activation: str | None) -> None:
    width = sizes["W"]
    torch._check_value(width <= WIDEST, lambda: f"weight must have W <= {WIDEST}, got W = {width}")
    torch._check_value(activation in ACTIVATIONS, lambda: f"activation must be None, silu or swish, got {activation!r}")


eager = valid.once(inputs)
eager_step = valid.once(step, pools=("state",))
