"""The chunkwise form of one sequence as ATen calls, forward and backward.

Both passes are gated linear attention with a gate of its own for each memory slot m; P_im - P_jm sums g over the steps
after j up to i, A and C are the states before the chunk:

    x_im = sum_{j <= i} (q_i . k_j) exp(P_im - P_jm) s_jm + exp(P_im) (A^T q_i)_m        value-gated; q already scaled
    p    = softmax(x)
    o_i  = sum_{j <= i} (sum_m p_im exp(P_im - P_jm) s_jm) v_j + C^T (exp(P_i) p_i)      key-gated

Tensors are [chunks, H, C, width], those of the queries [chunks, H, C * G, width]: the G query heads of a group lie next
to each other in every step, so they are more rows of the same product, and sums over them need no step of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fla_ops.validation import state_dtype

from ..call import Call, Gradients, Kept, Need, Outputs
from .slot_decay import (
    Halves,
    SlotDecay,
    diagonal,
    diagonal_part,
    diagonal_part_transposed,
    earlier_halves,
    key_gated_scores,
    later_halves,
    slot_decay,
    value_gated,
    value_gated_transposed,
)


@dataclass(frozen=True)
class Chunks:
    """The call of one sequence, in chunks."""

    q: Tensor  # scaled
    k: Tensor
    v: Tensor
    s: Halves
    decay: SlotDecay
    factor: float  # the scale inside q

    @property
    def size(self) -> int:
        """C, the steps of a chunk."""
        return self.k.shape[2]

    @property
    def carried(self) -> Tensor:
        """The weights of the memory slots, decayed to the chunk's end, where they enter the states."""
        return self.s.whole * self.decay.to_end

    def key_states(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """A before each chunk, and the final one."""
        return scan(self.k.mT @ self.carried, self.decay.total, initial)

    def value_states(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """C before each chunk, and the final one."""
        return scan(self.carried.mT @ self.v, self.decay.total.mT, initial)

    def earlier(self, scores: Tensor, states: Tensor) -> Tensor:
        """The strictly causal part of the softmax's argument, from scores q k^T."""
        x = value_gated(scores, self.s, self.decay)
        return x.addcmul_(self.q @ states, per_query(self.decay.from_start, x))


def in_chunks(c: Call) -> Chunks:
    """The call of one sequence, as `sequences.alone` gives it; where there are few steps, chunks are small."""
    dtype, heads = state_dtype(c.v), c.v.shape[1]
    size = min(c.chunk_steps, 1 << (len(c.q) - 1).bit_length())
    q, k, v, s, g = (to_chunks(x, heads, size, dtype) for x in c[:5])
    decay = slot_decay(g)
    return Chunks(q.mul_(c.scale), k, v, earlier_halves(s, decay), decay, c.scale)


def forward(x: Chunks, initial_k: Tensor | None, initial_v: Tensor | None) -> Kept:
    """What chunk_gsa_forward returns, in chunks."""
    states_k, final_k = x.key_states(initial_k)
    states_v, final_v = x.value_states(initial_v)
    scores = x.q @ x.k.mT
    earlier, own = x.earlier(scores, states_k), diagonal(scores)
    p = (earlier + diagonal_part(own, x.s.whole)).softmax(-1)
    o = key_gated_scores(later_halves(p, x.decay), x.s) @ x.v
    add_product_(o, p * per_query(x.decay.from_start, p), states_v)
    return Kept(o, final_k, final_v, earlier, own, states_k, states_v)


def backward(x: Chunks, d: Outputs, need: Need, saved: Kept) -> Gradients:
    """The gradients that are needed, in chunks where they have steps. `saved` has the states and maybe `earlier`."""
    dq = dk = dv = ds = dg = dinitial_k = dinitial_v = None
    states_k, states_v, do = saved.states_k, saved.states_v, d.o
    slots_needed = need.s or need.g
    scores = x.q @ x.k.mT
    earlier = x.earlier(scores, states_k) if saved.earlier is None else saved.earlier
    p = (earlier + diagonal_part(diagonal(scores), x.s.whole)).softmax(-1)
    from_start = per_query(x.decay.from_start, p)
    if need.v or slots_needed or need.initial_v:
        dstates_v, dinitial_v = scan((p * from_start).mT @ do, x.decay.total.mT, d.final_v, reverse=True)
    if need.v or slots_needed:
        queries_v = later_halves(p, x.decay)
    if need.v:
        dv = key_gated_scores(queries_v, x.s).mT @ do
        add_product_(dv, x.carried, dstates_v)
    if not (need.q or need.k or slots_needed or need.initial_k):
        return Gradients(dq, dk, dv, ds, dg, dinitial_k, dinitial_v)

    dscores = do @ x.v.mT
    dearlier = value_gated(dscores, x.s, x.decay).addcmul_(do @ states_v.mT, from_start)
    dp = dearlier + diagonal_part(diagonal(dscores), x.s.whole)
    dx = p * (dp - (p * dp).sum(-1, keepdim=True))
    if need.k or slots_needed or need.initial_k:
        dstates_k, dinitial_k = scan(x.q.mT @ (dx * from_start), x.decay.total, d.final_k, reverse=True)
    if need.q or need.k or slots_needed:
        queries_k = later_halves(dx, x.decay)
    if need.q or need.k:
        gated = key_gated_scores(queries_k, x.s)
        if need.q:
            dq = add_product_(gated @ x.k, dx * from_start, states_k.mT).mul_(x.factor)
        if need.k:
            dk = add_product_(gated.mT @ x.q, x.carried, dstates_k.mT)
    if slots_needed:
        across = (x.v @ dstates_v.mT).add_(x.k @ dstates_k).mul_(x.decay.to_end)
        ds = value_gated_transposed(dscores, queries_v, x.decay) + value_gated_transposed(scores, queries_k, x.decay)
    if need.g:
        read = (p * dearlier).addcmul_(earlier, dx).unflatten(2, (x.size, -1)).sum(3)
        carried = (states_k * dstates_k).sum(-2) + (states_v * dstates_v).sum(-1)
        dg = gate_gradient(x, read - x.s.whole * ds, x.s.whole * across, carried)
    if need.s:
        ds += across
        ds += diagonal_part_transposed(diagonal(dscores), p)
        ds += diagonal_part_transposed(diagonal(scores), dx)
    return Gradients(dq, dk, dv, ds, dg, dinitial_k, dinitial_v)


def gate_gradient(x: Chunks, inside: Tensor, across: Tensor, carried: Tensor) -> Tensor:
    """The gradient of g: of all that passes from before a step to it or past it, without leaving the chunk.

        dg_t = sum_{i >= t} inside_i + sum_{j < t} across_j + exp(P_C) carried

    `inside` is what a step reads from earlier ones less what later ones read from it, p dp + x dx - s ds; `across` is
    what a step writes to the outgoing states, s ds; `carried` is what the incoming states leave there,
    <A, dA> + <C, dC>.
    """
    dg = inside.flip(-2).cumsum(-2).flip(-2)
    dg[..., 1:, :] += across[..., :-1, :].cumsum(-2)
    dg += carried.unsqueeze(-2) * x.decay.total
    return dg.mul_(x.decay.alive)


def scan(updates: Tensor, decay: Tensor, initial: Tensor | None, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """S <- decay * S + update from chunk to chunk: S before each chunk [chunks, ...], and the last S.

    With reverse=True the chunks run backwards, and "before" a chunk is what comes from the one after it.
    """
    states, final = torch.empty_like(updates), updates.new_empty(updates.shape[1:])
    order = range(len(updates))[:: -1 if reverse else 1]
    before = [*(states[i] for i in order), final]
    if initial is None:
        before[0].zero_()
    else:
        before[0].copy_(initial)
    for step, i in enumerate(order):
        torch.addcmul(updates[i], decay[i], before[step], out=before[step + 1])
    return states, final


def per_query(factor: Tensor, queries: Tensor) -> Tensor:
    """Factors [..., C, M] repeated for each query head of a group, as in queries [..., C * G, M]."""
    group = queries.shape[-2] // factor.shape[-2]
    return factor if group == 1 else factor.repeat_interleave(group, -2)


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b, in place."""
    out.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return out


def to_chunks(x: Tensor, heads: int, size: int, dtype: torch.dtype) -> Tensor:
    """[T, heads * G, D] to [chunks, heads, size * G, D]; steps past the last are zeros."""
    time, all_heads, width = x.shape
    chunks = x.new_empty((-(-time // size), heads, size, all_heads // heads, width), dtype=dtype)
    chunks[time // size :] = 0
    for part, steps in _pieces(chunks, x):
        part.copy_(steps)
    return chunks.flatten(2, 3)


def from_chunks(chunks: Tensor, size: int, out: Tensor) -> Tensor:
    """Fill out [T, heads * G, D] from [chunks, heads, size * G, D]."""
    for part, steps in _pieces(chunks.unflatten(2, (size, -1)), out):
        steps.copy_(part)
    return out


def _pieces(chunks: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of [chunks, heads, C, G, D] and of [T, heads * G, D] over the same elements: the whole chunks, the rest."""
    _, heads, size, group, _ = chunks.shape
    whole, tail = divmod(len(x), size)
    steps = x.unflatten(1, (heads, group))
    yield chunks[:whole], steps[: whole * size].unflatten(0, (whole, size)).transpose(1, 2)
    if tail:
        yield chunks[-1, :, :tail], steps[whole * size :].transpose(0, 1)
