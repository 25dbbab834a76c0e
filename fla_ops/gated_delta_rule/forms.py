"""Which form of the gated delta rule serves which call."""

from __future__ import annotations

from fla_ops.dispatch import Family, Form, known, wants_gradient
from fla_ops.dispatch.crossovers import crossovers

from . import call, checks
from .call import Call


def order(c: Call) -> tuple[str, ...]:
    """Forms from fastest to slowest for this call; the chunk form serves a time that is not known."""
    table = crossovers("gated_delta_rule", c.v.device.type, wants_gradient(c))
    few = known(c.v.shape[1] <= table["recurrent_up_to"])
    return ("fused_recurrent", "chunk") if few else ("chunk", "fused_recurrent")


FAMILY = Family(
    signature=call.DISPATCHER,
    forms=(Form("chunk", call.CHUNK), Form("fused_recurrent", call.RECURRENT)),
    check=checks.inputs,
    order=order,
)
dispatch = FAMILY.dispatch
