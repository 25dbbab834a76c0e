"""The recurrent form: one walk for each state, the softmax between them; the gradients are walks of the same kernel
with other roles.

What a query reads is kept in two parts, the strictly causal one and the diagonal, the weight of its own step's memory
slots: the gradient of a gate is made of the former alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.common.gpu.arguments import contiguous, refuse_float64, refuse_width

from .. import checks
from ..call import Call, Gradients, Need, Outputs
from .abc_gates import of_inputs, with_gates
from .chunk import final_states
from .recurrent import Walk, gate_gradient
from .softmax_gradient import softmax_gradient


def forward(c: Call) -> Outputs:
    """o [B, T, HQ, V] in v's dtype, and the final states in float32 or None."""
    checks.eager(c)
    refuse_float64(c.q)
    for letter, x in (("K", c.q), ("V", c.v), ("M", c.s)):
        refuse_width(letter, x.shape[3])
    c = with_gates(contiguous(c))
    q, k, v, s = c[:4]
    final_k, final_v = final_states(c)
    argument, own = _read_parts(c)
    past = {"initial": c.initial_k, "final": final_k, "before": argument, "own": own}
    Walk(k, s, q, False, **past, scale=c.factor, over_slots=True).run(c)
    o = v.new_empty((*q.shape[:3], v.shape[3]))
    Walk(v, s, argument, True, initial=c.initial_v, final=final_v, y=o, own=own, softmax=True).run(c)
    return Outputs(o, final_k, final_v)


def backward(c: Call, d: Outputs, need: Need) -> Gradients:
    """The gradients that are needed, each in its input's dtype."""
    inside, given, d = need.of_gates(c.g), contiguous(c), contiguous(d)
    c = with_gates(given)
    q, k, v, s = c[:4]
    carried_k, carried_v = (_carried(c, x) if inside.g else None for x in (d.final_k, d.final_v))
    argument, dargument = _read_parts(c), _read_parts(c)
    Walk(
        k, s, q, False, initial=c.initial_k, dfinal=d.final_k, carried=carried_k,
        before=argument[0], own=argument[1], scale=c.factor, over_slots=True,
    ).run(c)
    Walk(
        v, s, d.o, True, initial=c.initial_v, dfinal=d.final_v, carried=carried_v,
        before=dargument[0], own=dargument[1], over_slots=True,
    ).run(c)
    p, dx, reads = softmax_gradient(argument, dargument, s, c.factor, inside.g)

    dq, dk, dv, dinitial_k, dinitial_v = (
        torch.empty_like(x) if wanted else None
        for x, wanted in zip((q, k, v, c.initial_k, c.initial_v), (*need[:3], *need[5:]), strict=True)
    )
    if need.q:
        Walk(k, s, dx, False, initial=c.initial_k, y=dq).run(c)
    if need.k or need.initial_k:
        Walk(q, dx, s, False, initial=d.final_k, final=dinitial_k, y=dk, backwards=True).run(c)
    if need.v or need.initial_v:
        Walk(d.o, p, s, True, initial=d.final_v, final=dinitial_v, y=dv, backwards=True).run(c)
    ds, later = (torch.empty(s.shape, dtype=torch.float32, device=s.device) if x else None for x in inside[3:5])
    if inside.s or inside.g:
        both = {"y": ds, "before": later, "over_slots": True, "backwards": True}
        Walk(q, dx, k, False, initial=d.final_k, **both).run(c)
        Walk(d.o, p, v, True, initial=d.final_v, add=True, **both).run(c)
    dg = gate_gradient(c, reads, later, (carried_k, carried_v)) if inside.g else None
    ds = ds.to(s.dtype) if inside.s else None
    return of_inputs(given, c, need, Gradients(dq, dk, dv, ds, dg, dinitial_k, dinitial_v))


def _read_parts(c: Call) -> tuple[Tensor, Tensor]:
    """The strictly causal part of what is read and its diagonal, empty [B, T, HQ, M] and [B, T, HQ], float32."""
    earlier = torch.empty(*c.q.shape[:3], c.s.shape[3], dtype=torch.float32, device=c.q.device)
    return earlier, torch.empty(c.q.shape[:3], dtype=torch.float32, device=c.q.device)


def _carried(c: Call, dfinal: Tensor | None) -> Tensor | None:
    """Empty [N, H, M], float32, where there is a gradient of the final state."""
    if dfinal is None:
        return None
    return torch.empty(c.sequences, *c.g.shape[2:], dtype=torch.float32, device=dfinal.device)
