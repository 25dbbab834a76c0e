"""Which form of gsa serves which call, and why not."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.dispatch import Family, Form, known, refuse_reverse, wants_gradient
from fla_ops.dispatch.crossovers import crossovers

from . import call, checks
from .call import Call

Result = tuple[Tensor, Tensor | None, Tensor | None]


def order(c: Call) -> tuple[str, ...]:
    """Forms from fastest to slowest for this call; the chunk form serves a time that is not known."""
    table = crossovers("gsa", c.v.device.type, wants_gradient(c))
    few = known(c.v.shape[1] <= table["recurrent_up_to"])
    return ("fused_recurrent", "chunk") if few else ("chunk", "fused_recurrent")


def chunk(c: Call) -> Result:
    """The body of torch.ops.fla.chunk_gsa. What a gradient would keep is kept only if one is wanted."""
    if c.checkpoint_level in (0, 1) and not wants_gradient(c):
        c = c._replace(checkpoint_level=2)
    o, final_k, final_v, *_ = torch.ops.fla.chunk_gsa_forward(*call.CHUNK_FORWARD.arguments_of(c))
    return o, final_k, final_v


FAMILY = Family(
    signature=call.DISPATCHER,
    forms=(Form("chunk", call.CHUNK, refuse_reverse), Form("fused_recurrent", call.RECURRENT)),
    check=checks.inputs,
    order=order,
)
dispatch = FAMILY.dispatch
