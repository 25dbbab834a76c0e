"""Which form of attn serves which call, and why not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from fla_ops.dispatch import Family, Form, known, wants_gradient

from . import call, checks
from .call import Call, Joinable, Prefill

NAMES = ("parallel", "decoding")


def refuse_parallel(c: Call) -> list[str]:
    """As many queries as keys, and gates as they are."""
    queries, keys = c.q.shape[1], c.k.shape[1]
    return [
        *[f"q has {queries} steps and k has {keys}: every step has a query and a key"]
        * (c.cu_seqlens is not None and known(queries != keys)),
        *["do_gate_scale belongs to decoding: multiply g before the call"] * c.do_gate_scale,
    ]


def refuse_decoding(c: Call) -> list[str]:
    """One query for each packed sequence, and no gradient."""
    queries, packed = c.q.shape[1], c.cu_seqlens is not None
    return [
        *["decoding needs cu_seqlens, which says whose cache is where"] * (not packed),
        *[f"q has {queries} steps and cu_seqlens names {c.sequences} sequences: decoding takes one step of each"]
        * (packed and known(queries != c.sequences)),
        *["decoding is for inference and has no gradient"] * wants_gradient(c),
    ]


def order(c: Call) -> tuple[str, ...]:
    """As many queries as keys are the parallel form's, also with one key a sequence; so are sizes that are unknown."""
    queries, keys = c.q.shape[1], c.k.shape[1]
    if guard_or_false(queries == keys):  # a guard that either form would add
        return NAMES
    return NAMES[::-1] if known(queries == c.sequences) or known(queries != keys) else NAMES


def check(c: Call) -> None:
    """What the chosen form's operator checks."""
    if FAMILY.choose(c).form.signature is call.DECODING:
        checks.decoding(call.DECODING.call_of(call.DECODING.arguments_of(c)))
    else:
        checks.inputs(c)


def parallel(c: Call) -> Tensor:
    """The body of torch.ops.fla.parallel_attn: a gradient also needs the rounding residual."""
    c = c._replace(output_rest=wants_gradient(c))
    o: Tensor = torch.ops.fla.parallel_attn_forward(*call.FORWARD.arguments_of(c))[0]
    return o


def prefill(c: Prefill) -> Joinable:
    """The body of torch.ops.fla.attn_prefill."""
    c = c._replace(output_rest=wants_gradient(c))
    return Joinable(*torch.ops.fla.attn_prefill_forward(*call.PREFILL_FORWARD.arguments_of(c))[:2])


FAMILY = Family(
    signature=call.DISPATCHER,
    forms=(
        Form(NAMES[0], call.PARALLEL, refuse_parallel),
        Form(NAMES[1], call.DECODING, refuse_decoding),
    ),
    check=check,
    order=order,
)
dispatch = FAMILY.dispatch
