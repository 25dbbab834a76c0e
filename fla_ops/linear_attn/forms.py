"""Which form of linear_attn serves which call, and why not."""

from __future__ import annotations

from fla_ops.dispatch import Family, Form, refuse_reverse
from fla_ops.simple_gla import forms as simple_gla

from . import call, checks
from .call import Call

FORMS = (
    Form("chunk", call.CHUNK, refuse_reverse),
    Form("fused_chunk", call.FUSED_CHUNK, refuse_reverse, simple_gla.note_chunk_kernels),
    Form("fused_recurrent", call.RECURRENT),
)


def order(c: Call) -> tuple[str, ...]:
    """simple_gla's order, which this family's time follows."""
    names = [form.name for form in FORMS]
    return tuple(name for name in simple_gla.order(c) if name in names)


FAMILY = Family(signature=call.DISPATCHER, forms=FORMS, check=checks.call, order=order)
dispatch = FAMILY.dispatch
