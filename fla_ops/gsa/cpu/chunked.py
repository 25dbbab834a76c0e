"""The chunkwise form of gsa as ATen calls, forward and backward.

Both passes are gated linear attention with a gate of its own for each slot m; P_im - P_jm sums g over the steps after j
up to i, A and C are the states before the chunk:

    x_im = sum_{j <= i} (q_i . k_j) exp(P_im - P_jm) s_jm + exp(P_im) (A^T q_i)_m        (q already scaled)
    p    = softmax(x)
    o_i  = sum_{j <= i} (sum_m p_im exp(P_im - P_jm) s_jm) v_j + C^T (exp(P_i) p_i)

In the first the gate is on what comes out ("spread"), in the second on what is summed over ("contract"). Tensors are
[rows, lanes, H, C, width], those of the queries [rows, lanes, H, C * G, width]: the G query heads of a group lie next
to each other in every step, so they are more rows of the same product, and sums over them need no step of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .slot_decay import (
    ChannelDecay,
    Writers,
    channel_decay,
    contract,
    own_scores,
    readers,
    spread,
    spread_back,
    spread_back_own,
    spread_own,
    writers,
)

Gradients = tuple[Tensor | None, ...]


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32: half-precision inputs are converted once, while they are cut into chunks."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def scale_of(q: Tensor, scale: float | None) -> float:
    """K ** -0.5 unless given."""
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


@dataclass(frozen=True)
class Inputs:
    """One call in chunks."""

    layout: Any
    dtype: torch.dtype
    q: Tensor  # scaled
    k: Tensor
    v: Tensor
    s: Writers
    decay: ChannelDecay

    @property
    def written(self) -> Tensor:
        """Slots' weights as they enter the outgoing states."""
        return self.s.whole * self.decay.to_end


def cut(layout: Any, q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, scale: float | None) -> Inputs:
    """The call's tensors in chunks."""
    dtype, heads = compute_dtype(v), k.shape[2]
    decay = channel_decay(layout.split(g, dtype))
    return Inputs(
        layout,
        dtype,
        split_group(layout, q, heads, dtype).mul_(scale_of(q, scale)),
        layout.split(k, dtype),
        layout.split(v, dtype),
        writers(layout.split(s, dtype), decay),
        decay,
    )


def split_group(layout: Any, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H * G, D] to [rows, lanes, H, C * G, D]."""
    width = x.shape[3]
    chunks = layout.split(x.unflatten(2, (heads, -1)).flatten(3), dtype)
    return chunks.unflatten(-1, (-1, width)).flatten(3, 4)


def join_group(layout: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of split_group."""
    steps = x.unflatten(3, (layout.size, -1)).flatten(4, 5)
    return layout.join(steps, dtype).unflatten(-1, (-1, x.shape[-1])).flatten(2, 3)


def first_pass(c: Inputs, scores: Tensor, states: Tensor) -> Tensor:
    """What each query reads from the steps before its own, from the scores q k^T."""
    earlier = spread(scores, c.s, c.decay)
    return add_product_(earlier, c.q, states, under(c.decay.from_start, earlier))


def second_pass(c: Inputs, p: Tensor, states: Tensor) -> Tensor:
    """The output o, from the softmax p."""
    o = contract(readers(p, c.decay), c.s) @ c.v
    return add_product_(o, p * under(c.decay.from_start, p), states)


def key_states(c: Inputs, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """A before each row, and the final one."""
    updates = c.k.mT @ c.written
    states, final = c.layout.scan(updates, c.decay.total, entering(initial, c.dtype))
    return states, final


def value_states(c: Inputs, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """C before each row, and the final one."""
    updates = c.written.mT @ c.v
    states, final = c.layout.scan(updates, c.decay.total.mT, entering(initial, c.dtype))
    return states, final


def forward(
    c: Inputs, initial_k: Tensor | None, initial_v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, `earlier` and `own` in chunks, the states before each row, the final states.

    The argument of the softmax is kept as what comes from earlier steps and the weight of a step's own slots.
    """
    states_k, final_k = key_states(c, initial_k)
    states_v, final_v = value_states(c, initial_v)
    scores = c.q @ c.k.mT
    earlier = first_pass(c, scores, states_k)
    own = own_scores(scores)
    p = (earlier + spread_own(own, c.s)).softmax(-1)
    return second_pass(c, p, states_v), earlier, own, states_k, states_v, final_k, final_v


def backward(
    c: Inputs,
    earlier: Tensor | None,
    states_k: Tensor,
    states_v: Tensor,
    do: Tensor,
    dfinal_k: Tensor | None,
    dfinal_v: Tensor | None,
    factor: float,
    output_mask: list[bool],
) -> Gradients:
    """Gradients in chunks of q, k, v, s and g, and those of the initial states; `factor` is the scale inside c.q."""
    need_q, need_k, need_v, need_s, need_g, need_first, need_second = output_mask
    written = need_s or need_g
    dq = dk = dv = ds = dg = dstates_k = dstates_v = dinitial_k = dinitial_v = None
    scores = c.q @ c.k.mT
    earlier = first_pass(c, scores, states_k) if earlier is None else earlier
    p = (earlier + spread_own(own_scores(scores), c.s)).softmax(-1)
    enter = under(c.decay.from_start, p)
    if need_v or written or need_second:
        updates = (p * enter).mT @ do
        dstates_v, dinitial_v = c.layout.scan(updates, c.decay.total.mT, entering(dfinal_v, c.dtype), reverse=True)
    if need_v or written:
        reads_v = readers(p, c.decay)
    if need_v:
        dv = contract(reads_v, c.s).mT @ do
        add_product_(dv, c.written, dstates_v)
    if not (need_q or need_k or written or need_first):
        return dq, dk, dv, ds, dg, dinitial_k, dinitial_v

    dproducts = do @ c.v.mT
    dearlier = add_product_(spread(dproducts, c.s, c.decay), do, states_v.mT, enter)
    dp = dearlier + spread_own(own_scores(dproducts), c.s)
    dx = p * (dp - (p * dp).sum(-1, keepdim=True))
    if need_k or written or need_first:
        updates = c.q.mT @ (dx * enter)
        dstates_k, dinitial_k = c.layout.scan(updates, c.decay.total, entering(dfinal_k, c.dtype), reverse=True)
    if need_q or need_k or written:
        reads_k = readers(dx, c.decay)
    if need_q or need_k:
        dscores = contract(reads_k, c.s)
        if need_q:
            dq = add_product_(dscores @ c.k, dx * enter, states_k.mT).mul_(factor)
        if need_k:
            dk = add_product_(dscores.mT @ c.q, c.written, dstates_k.mT)
    if written:
        across = c.v @ dstates_v.mT
        across.add_(c.k @ dstates_k).mul_(c.decay.to_end)
        ds = spread_back(dproducts, reads_v, c.decay) + spread_back(scores, reads_k, c.decay)
    if need_g:
        reads = (p * dearlier).addcmul_(earlier, dx)
        dg = gate_gradient(c, reads, ds, across, (states_k, states_v), (dstates_k, dstates_v))
    if need_s:
        ds += across
        ds += spread_back_own(own_scores(dproducts), reads_v)
        ds += spread_back_own(own_scores(scores), reads_k)
    return dq, dk, dv, ds if need_s else None, dg, dinitial_k, dinitial_v


def gate_gradient(
    c: Inputs,
    reads: Tensor,
    ds: Tensor,
    across: Tensor,
    states: tuple[Tensor, Tensor],
    dstates: tuple[Tensor, Tensor],
) -> Tensor:
    """The gradient of g, all that passes from before a step to it or past it, without leaving the chunk.

    Between two steps of the chunk: what a step reads from earlier ones (`reads`, p dp + x dx), less what later ones
    read from it (s ds), summed to the end. Past the end: what the steps before write to the outgoing states (s across),
    summed from the start, and what the incoming states leave there.
    """
    inside = reads.unflatten(3, (c.layout.size, -1)).sum(4) - c.s.whole * ds
    dg = inside.flip(-2).cumsum(-2).flip(-2)
    dg[..., 1:, :] += (c.s.whole * across)[..., :-1, :].cumsum(-2)
    carried = (states[0] * dstates[0]).sum(-2) + (states[1] * dstates[1]).sum(-1)
    dg += carried.unsqueeze(-2) * c.decay.total
    return dg.mul_(c.decay.alive)


def entering(state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A state in the dtype in which it is carried."""
    return None if state is None else state.to(dtype)


def under(factor: Tensor, like: Tensor) -> Tensor:
    """Factors [..., C, M] for the rows of `like` [..., C * G, M]."""
    group = like.shape[-2] // factor.shape[-2]
    return factor if group == 1 else factor.repeat_interleave(group, -2)


def add_product_(out: Tensor, a: Tensor, b: Tensor, factor: Tensor | None = None) -> Tensor:
    """out += factor * (a @ b), in place."""
    if factor is not None:
        return out.addcmul_(a @ b, factor)
    flat = out.view(-1, *out.shape[-2:])
    flat.baddbmm_(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]))
    return out
