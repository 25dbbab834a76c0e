"""Decays of their own for each memory slot inside a chunk, for ATen implementations.

The weight of step j at step i, exp(g_{j+1} + ... + g_i), differs from slot to slot, so in a product over slots it must
be split between the two operands. Cut the chunk in two halves. A pair of steps in different halves meets at the
boundary b: exp(g_{j+1} + ... + g_b) goes with j, exp(g_{b+1} + ... + g_i) with i. Pairs in the same half are cut
again. So log2(C) levels of block products cover every pair, no exponent is positive where g is not, and nothing is ever
divided or subtracted: a decay of zero (g = -inf) is a plain zero.

Tensors are [..., C, M]. Queries may come in groups of G heads that share a gate, as [..., C * G, width], with the heads
of a group side by side in each step. All sums are causal: step i sees j <= i. The value-gated pass keeps its diagonal
j = i, which does not decay, apart from its strictly causal part: the gradient of a gate is a difference in which the
diagonal would cancel, and under strong decays it is all there is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def floor(dtype: torch.dtype) -> float:
    """A log decay at or below this is zero to `dtype`. Products stay far above denormals, which slow a CPU's matrix
    products.
    """
    return -80.0 if dtype is torch.float64 else -30.0


@dataclass(frozen=True)
class SlotDecay:
    """Decay factors of chunks; the levels go from halves of one step to halves of C / 2."""

    after: list[Tensor]  # [..., n, h, M]: from the boundary to each step of the later halves
    before: list[Tensor]  # [..., n, h, M]: from each step of the earlier halves to the boundary
    from_start: Tensor  # [..., C, M]: of the incoming state at each step
    to_end: Tensor  # [..., C, M]: of each step at the chunk's end
    total: Tensor  # [..., 1, M]: of the incoming state at the chunk's end
    alive: Tensor  # [..., C, M]: False where the decay is zero, which has no gradient


@dataclass(frozen=True)
class Halves:
    """Steps [..., C * G, M], and on each level one half of every block times its decay, [..., n, h * G, M]."""

    whole: Tensor
    decayed: list[Tensor]


def slot_decay(g: Tensor) -> SlotDecay:
    """The factors of log decays g [..., C, M], C a power of two."""
    smallest = math.exp(floor(g.dtype))
    step = torch.threshold_(g.exp(), smallest, 0)
    prefix, suffix = step.clone(), torch.ones_like(step)  # of a block: from its start to a step, from a step to its end
    after, before = [], []
    blocks = g.shape[-2] // 2
    while blocks:
        (early, late), (early_rest, _) = (_halves(x, blocks).unbind(-3) for x in (prefix, suffix))
        after.append(late.clone(memory_format=torch.contiguous_format))
        before.append(early_rest.clone(memory_format=torch.contiguous_format))
        # denormals would slow every product
        torch.threshold_(early_rest.mul_(late[..., -1:, :]), smallest, 0)
        torch.threshold_(late.mul_(early[..., -1:, :]), smallest, 0)
        blocks //= 2
    return SlotDecay(after, before, prefix, suffix, prefix[..., -1:, :], step > 0)


def later_halves(x: Tensor, decay: SlotDecay) -> Halves:
    """What looks back from the boundaries of each level: queries x [..., C * G, M]."""
    decayed = []
    for factor in decay.after:
        late = _halves(x, factor.shape[-3]).select(-3, 1)
        decayed.append((late.unflatten(-2, (factor.shape[-2], -1)) * factor.unsqueeze(-2)).flatten(-3, -2))
    return Halves(x, decayed)


def earlier_halves(x: Tensor, decay: SlotDecay) -> Halves:
    """What is seen from the boundaries of each level: keys or values x [..., C, M]."""
    return Halves(x, [_halves(x, factor.shape[-3]).select(-3, 0) * factor for factor in decay.before])


def key_gated_scores(queries: Halves, keys: Halves) -> Tensor:
    """sum_m q_im exp(P_im - P_jm) k_jm for j <= i, else 0; [..., C * G, C]."""
    steps = keys.whole.shape[-2]
    scores = keys.whole.new_zeros(*queries.whole.shape[:-1], steps)
    groups = queries.whole.unflatten(-2, (steps, -1))
    diagonal(scores).copy_((groups @ keys.whole.unsqueeze(-1))[..., 0])
    for late, early in zip(queries.decayed, keys.decayed, strict=True):
        _blocks(scores, late.shape[-3]).copy_((late @ early.mT).movedim(-3, -1))
    return scores


def value_gated(scores: Tensor, values: Halves, decay: SlotDecay) -> Tensor:
    """The strictly causal part, sum_{j < i} scores_ij exp(P_im - P_jm) v_jm for scores [..., C * G, C]."""
    y = scores.new_zeros(*scores.shape[:-1], values.whole.shape[-1])
    for factor, early in zip(decay.after, values.decayed, strict=True):
        arriving = _blocks(scores, factor.shape[-3]).movedim(-1, -3) @ early
        late = _halves(y, factor.shape[-3]).select(-3, 1).unflatten(-2, (factor.shape[-2], -1))
        late.addcmul_(arriving.unflatten(-2, (factor.shape[-2], -1)), factor.unsqueeze(-2))
    return y


def value_gated_transposed(scores: Tensor, queries: Halves, decay: SlotDecay) -> Tensor:
    """The same for what is seen, y_jm = sum_{i > j} scores_ij exp(P_im - P_jm) q_im, over the group; [..., C, M]."""
    y = scores.new_zeros(*scores.shape[:-2], scores.shape[-1], queries.whole.shape[-1])
    for factor, late in zip(decay.before, queries.decayed, strict=True):
        arriving = _blocks(scores, factor.shape[-3]).movedim(-1, -3).mT @ late
        _halves(y, factor.shape[-3]).select(-3, 0).addcmul_(arriving, factor)
    return y


def diagonal(scores: Tensor) -> Tensor:
    """A view of the scores of each step with itself, [..., C, G]."""
    return scores.unflatten(-2, (scores.shape[-1], -1)).diagonal(dim1=-3, dim2=-1).mT


def diagonal_part(own: Tensor, values: Tensor) -> Tensor:
    """What the strictly causal part leaves out, scores_ii v_im, [..., C * G, M]."""
    return (own.unsqueeze(-1) * values.unsqueeze(-2)).flatten(-3, -2)


def diagonal_part_transposed(own: Tensor, queries: Tensor) -> Tensor:
    """The same for what is seen, scores_jj q_jm, summed over the group; [..., C, M]."""
    return (own.unsqueeze(-2) @ queries.unflatten(-2, (own.shape[-2], -1))).squeeze(-2)


def _halves(x: Tensor, blocks: int) -> Tensor:
    """[..., C * G, width] to [..., blocks, 2, C * G / (2 blocks), width]."""
    return x.unflatten(-2, (blocks, 2, -1))


def _blocks(scores: Tensor, blocks: int) -> Tensor:
    """The entries of [..., C * G, C] in which a later half sees an earlier one, [..., h * G, h, blocks]."""
    cut = scores.unflatten(-2, (blocks, 2, -1)).unflatten(-1, (blocks, 2, -1))
    return cut.select(-5, 1).select(-2, 0).diagonal(dim1=-4, dim2=-2)
