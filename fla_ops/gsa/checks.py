"""What the gsa operators accept."""

from __future__ import annotations

import torch

from fla_ops import validation as valid

from .call import Advance, Call, Prefill, Record, Step

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


def step(c: Step | Prefill) -> valid.Sizes:
    """The arguments of one decode step; sizes may be symbolic."""
    sizes = valid.axes(c, grouped=GROUPED)
    valid.same_dtype(q=c.q, k=c.k, v=c.v)
    valid.floating(s=c.s, g=c.g)
    valid.pools(c, "state_k", "state_v")
    valid.same_device(c)
    return sizes


def prefill(c: Prefill) -> valid.Sizes:
    """The arguments of a prefill into pools; sizes may be symbolic."""
    sizes = step(c)
    valid.mask(fresh=c.fresh)
    valid.chunk_size(c.chunk_size)
    return sizes


def record(c: Record) -> valid.Sizes:
    """The arguments of a walk that keeps states; sizes may be symbolic."""
    sizes = valid.axes(c, grouped=GROUPED)
    valid.same_dtype(k=c.k, v=c.v, **({} if c.q is None else {"q": c.q}))
    valid.floating(s=c.s, g=c.g, initial_k=c.initial_k, initial_v=c.initial_v)
    valid.same_device(c)
    valid.chunk_size(c.chunk_size)
    valid.integral(at=c.at)
    valid.stretch(c.every, c.chunk_size)
    return sizes


def advance(c: Advance) -> None:
    """The arguments of the steps that are taken; sizes may be symbolic."""
    valid.axes(c)
    valid.same_dtype(k=c.k, v=c.v)
    valid.floating(s=c.s, g=c.g)
    valid.pools(c, "state_k", "state_v")
    valid.integral(accepted=c.accepted)
    valid.same_device(c)


eager = valid.once(inputs)
eager_step = valid.once(step, pools=("state_k", "state_v"))
eager_prefill = valid.once(prefill, pools=("state_k", "state_v"))
eager_record = valid.once(record)
eager_advance = valid.once(advance, pools=("state_k", "state_v"))
