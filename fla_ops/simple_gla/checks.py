"""What the simple_gla operators accept."""

from __future__ import annotations

from fla_ops import validation as valid

from .call import Advance, Call, Prefill, Record, Step

GROUPED = ("v", "H", "q and k", "HK")  # each query/key head serves H // HK value heads


def inputs(c: Call) -> valid.Sizes:
    """Raise ValueError or TypeError unless the arguments describe one call; sizes may be symbolic."""
    sizes = valid.axes(c, grouped=GROUPED)
    valid.same_dtype(q=c.q, k=c.k, v=c.v)
    valid.exclusive(g=c.g, g_gamma=c.g_gamma)
    valid.floating(g=c.g, g_gamma=c.g_gamma, initial_state=c.initial_state)
    valid.same_device(c)
    valid.chunk_size(c.chunk_size)
    return sizes


def step(c: Step | Prefill) -> valid.Sizes:
    """The arguments of one decode step; sizes may be symbolic."""
    sizes = valid.axes(c, grouped=GROUPED)
    valid.same_dtype(q=c.q, k=c.k, v=c.v)
    valid.exclusive(g=c.g, g_gamma=c.g_gamma)
    valid.floating(g=c.g, g_gamma=c.g_gamma)
    valid.pools(c, "state")
    valid.same_device(c)
    return sizes


def record(c: Record) -> valid.Sizes:
    """The arguments of a walk that keeps states; sizes may be symbolic."""
    sizes = valid.axes(c, grouped=GROUPED)
    valid.same_dtype(k=c.k, v=c.v, **({} if c.q is None else {"q": c.q}))
    valid.exclusive(g=c.g, g_gamma=c.g_gamma)
    valid.floating(g=c.g, g_gamma=c.g_gamma, initial_state=c.initial_state)
    valid.same_device(c)
    valid.chunk_size(c.chunk_size)
    valid.integral(at=c.at)
    valid.stretch(c.every, c.chunk_size)
    return sizes


def advance(c: Advance) -> None:
    """The arguments of the steps that are taken; sizes may be symbolic."""
    valid.axes(c, grouped=("v", "H", "k", "HK"))
    valid.same_dtype(k=c.k, v=c.v)
    valid.exclusive(g=c.g, g_gamma=c.g_gamma)
    valid.floating(g=c.g, g_gamma=c.g_gamma)
    valid.pools(c, "state")
    valid.integral(accepted=c.accepted)
    valid.same_device(c)


def prefill(c: Prefill) -> valid.Sizes:
    """The arguments of a prefill into a pool; sizes may be symbolic."""
    sizes = step(c)
    valid.mask(fresh=c.fresh)
    valid.chunk_size(c.chunk_size)
    return sizes


eager = valid.once(inputs)
eager_step = valid.once(step, pools=("state",))
eager_record = valid.once(record)
eager_advance = valid.once(advance, pools=("state",))
eager_prefill = valid.once(prefill, pools=("state",))
