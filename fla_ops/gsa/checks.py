"""What the gsa operators accept."""

from __future__ import annotations

import torch

from fla_ops import validation as valid

from .call import Call, Step

GROUPED = ("q", "HQ", "k, v, s and g", "H")  # each head of these serves HQ // H query heads


def inputs(c: Call) -> valid.Sizes:
    """Raise ValueError or TypeError unless the arguments describe one call; sizes may be symbolic."""
    sizes = valid.axes(c, grouped=GROUPED)
    valid.same_dtype(q=c.q, k=c.k, v=c.v)
    valid.floating(s=c.s, g=c.g, initial_k=c.initial_k, initial_v=c.initial_v)
    valid.same_device(c)
    valid.chunk_size(c.chunk_size)
    torch._check_value(
        c.checkpoint_level in (0, 1, 2), lambda: f"checkpoint_level must be 0, 1 or 2, got {c.checkpoint_level}"
    )
    return sizes


def step(c: Step) -> valid.Sizes:
    """The arguments of one decode step; sizes may be symbolic."""
    sizes = valid.axes(c, grouped=GROUPED)
    valid.same_dtype(q=c.q, k=c.k, v=c.v)
    valid.floating(s=c.s, g=c.g)
    valid.pools(c, "state_k", "state_v")
    valid.same_device(c)
    return sizes


eager = valid.once(inputs)
eager_step = valid.once(step, pools=("state_k", "state_v"))
