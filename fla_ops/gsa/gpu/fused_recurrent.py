"""The recurrent form: one walk for each state, the softmax between them; the gradients are walks of the same kernel
with other roles.

What a query reads is kept apart as what earlier steps give, and the weight of its own step's slots: the gradient of a
gate is made of the former alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.common.gpu.arguments import check_offsets, contiguous, refuse_float64, refuse_width, scale_of

from .. import checks
from .abc_gates import slot_gates, slot_gates_gradient
from .chunk import final_states
from .recurrent import Steps
from .softmax_gradient import softmax_gradient


def forward(q, k, v, s, g, scale, initial_k, initial_v, output_final_state, reverse, cu_seqlens, cu_seqlens_cpu):
    """o [B, T, HQ, V] in v's dtype, and the final states in float32 or None."""
    checks.launch(q, k, v, s, g, initial_k, initial_v, cu_seqlens, cu_seqlens_cpu)
    refuse_float64(q)
    for letter, x in (("K", q), ("V", v), ("M", s)):
        refuse_width(letter, x.shape[3])
    check_offsets(cu_seqlens, q.shape[1])
    q, k, v, s, g, initial_k, initial_v, cu_seqlens = contiguous(q, k, v, s, g, initial_k, initial_v, cu_seqlens)
    s, g = slot_gates(s, cu_seqlens, reverse) if g is None else (s, g)
    steps = Steps(g, cu_seqlens, reverse)

    final_k, final_v = final_states(q, v, s, cu_seqlens) if output_final_state else (None, None)
    earlier, own = _reading(q, s)
    keys = {"initial": initial_k, "final": final_k, "before": earlier, "own": own}
    steps.walk(k, s, q, False, **keys, scale=scale_of(q, scale), over_slots=True)
    o = v.new_empty((*q.shape[:3], v.shape[3]))
    steps.walk(v, s, earlier, True, initial=initial_v, final=final_v, y=o, own=own, softmax=True)
    return o, final_k, final_v


def backward(q, k, v, s, g, initial_k, initial_v, cu_seqlens, do, dfinal_k, dfinal_v, scale, reverse, output_mask):
    """The gradients that output_mask asks for (q, k, v, s, g and the states), each in its input's dtype."""
    slots, wanted, gated = s, checks.mask(g, output_mask), g is not None
    q, k, v, s, g, do, cu_seqlens = contiguous(q, k, v, s, g, do, cu_seqlens)
    initial_k, initial_v, dfinal_k, dfinal_v = contiguous(initial_k, initial_v, dfinal_k, dfinal_v)
    s, g = (s, g) if gated else slot_gates(s, cu_seqlens, reverse)
    need_q, need_k, need_v, need_s, need_g, need_first, need_second = wanted
    steps = Steps(g, cu_seqlens, reverse)

    carried = [_carried(steps, dfinal) if need_g else None for dfinal in (dfinal_k, dfinal_v)]
    pairs = zip((dfinal_k, dfinal_v), carried, strict=True)
    keys, values = ({"over_slots": True, "dfinal": x, "carried": y} for x, y in pairs)
    earlier, own = _reading(q, s)
    steps.walk(k, s, q, False, initial=initial_k, before=earlier, own=own, scale=scale_of(q, scale), **keys)
    dearlier, down = _reading(q, s)
    steps.walk(v, s, do, True, initial=initial_v, before=dearlier, own=down, **values)
    p, dx, reads = softmax_gradient(earlier, own, dearlier, down, s, scale_of(q, scale), need_g)

    dq, dk, dv = (torch.empty_like(x) if need else None for x, need in ((q, need_q), (k, need_k), (v, need_v)))
    dinitial_k = torch.empty_like(initial_k) if need_first else None
    dinitial_v = torch.empty_like(initial_v) if need_second else None
    if need_q:
        steps.walk(k, s, dx, False, initial=initial_k, y=dq)
    if need_k or need_first:
        steps.walk(q, dx, s, False, initial=dfinal_k, final=dinitial_k, y=dk, backwards=True)
    if need_v or need_second:
        steps.walk(do, p, s, True, initial=dfinal_v, final=dinitial_v, y=dv, backwards=True)
    ds, later = (torch.empty_like(g, dtype=torch.float32) if need else None for need in (need_s, need_g))
    if need_s or need_g:
        both = {"y": ds, "before": later, "over_slots": True, "backwards": True}
        steps.walk(q, dx, k, False, initial=dfinal_k, **both)
        steps.walk(do, p, v, True, initial=dfinal_v, add=True, **both)
    dg = steps.gate_gradient(reads, s, later, carried, g.dtype) if need_g else None
    if gated:
        ds = ds.to(slots.dtype) if need_s else None
    else:
        ds, dg = slot_gates_gradient(s, g, cu_seqlens, ds, dg, slots.dtype, reverse) if need_s else None, None
    return dq, dk, dv, ds, dg, dinitial_k, dinitial_v


def _reading(q: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Empty [B, T, HQ, M] and [B, T, HQ], float32."""
    earlier = torch.empty(*q.shape[:3], s.shape[3], dtype=torch.float32, device=q.device)
    return earlier, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _carried(steps: Steps, dfinal: Tensor | None) -> Tensor | None:
    """Empty [N, H, M], float32, where there is a gradient of the final state."""
    if dfinal is None:
        return None
    return torch.empty(steps.sequences, *steps.g.shape[2:], dtype=torch.float32, device=dfinal.device)
