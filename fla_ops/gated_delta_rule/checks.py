"""What the gated delta rule's operators accept."""

from __future__ import annotations

from fla_ops import validation as valid

from .call import Call, Step

GROUPED = ("v", "H", "q and k", "HK")  # each query/key head serves H // HK value heads


def inputs(c: Call) -> valid.Sizes:
    """Raise ValueError or TypeError unless the arguments describe one call; sizes may be symbolic."""
    sizes = valid.axes(c, grouped=GROUPED)
    valid.same_dtype(q=c.q, k=c.k, v=c.v)
    valid.floating(g=c.g, beta=c.beta, initial_state=c.initial_state)
    valid.same_device(c)
    valid.chunk_size(c.chunk_size)
    return sizes


def step(c: Step) -> valid.Sizes:
    """The arguments of one decode step; sizes may be symbolic."""
    sizes = valid.axes(c, grouped=GROUPED)
    valid.same_dtype(q=c.q, k=c.k, v=c.v)
    valid.floating(g=c.g, beta=c.beta)
    valid.pools(c, "state")
    valid.same_device(c)
    return sizes


eager = valid.once(inputs)
eager_step = valid.once(step, pools=("state",))
