"""Decays of their own for each channel inside a chunk, for ATen implementations.

The weight of step j at step i, exp(g_{j+1} + ... + g_i), differs from channel to channel, so it cannot be applied to a
product over channels: it has to ride on the two factors of that product. Cut the chunk in two halves. A pair of steps
in different halves meets at the boundary b: exp(g_{j+1} + ... + g_b) goes with j, exp(g_{b+1} + ... + g_i) with i.
Pairs in the same half are cut again. So log2(C) levels of block products cover every pair, no exponent is positive
where g is not, and nothing is ever divided or subtracted: a decay of zero (g = -inf) is a plain zero.

Tensors are [..., C, M]; what reads may come in groups that share a gate, as [..., C * G, width], G steps of a group
together. All sums are causal: step i sees j <= i. The term j = i, which does not decay, is kept apart in spread: the
gradient of a gate is a difference in which it would cancel, and strong decays leave nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fla_ops.common.cpu.decay import floor


@dataclass(frozen=True)
class ChannelDecay:
    """Decay factors of chunks; the levels go from halves of one step to halves of C / 2."""

    after: list[Tensor]  # [..., n, h, M]: from the boundary to each step of the later halves
    before: list[Tensor]  # [..., n, h, M]: from each step of the earlier halves to the boundary
    from_start: Tensor  # [..., C, M]: of the incoming state at each step
    to_end: Tensor  # [..., C, M]: of each step at the chunk's end
    total: Tensor  # [..., 1, M]: of the incoming state at the chunk's end
    alive: Tensor  # [..., C, M]: False where the decay is zero, which has no gradient


@dataclass(frozen=True)
class Readers:
    """What reads, [..., C * G, M], and its later halves under their decay, [..., n, h * G, M]."""

    whole: Tensor
    halves: list[Tensor]


@dataclass(frozen=True)
class Writers:
    """What is read, [..., C, M], and its earlier halves under their decay, [..., n, h, M]."""

    whole: Tensor
    halves: list[Tensor]


def channel_decay(g: Tensor) -> ChannelDecay:
    """Factors of log decays g [..., C, M], C a power of two."""
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
    return ChannelDecay(after, before, prefix, suffix, prefix[..., -1:, :], step > 0)


def readers(x: Tensor, decay: ChannelDecay) -> Readers:
    """x [..., C * G, M] as the reading side of a product."""
    halves = []
    for factor in decay.after:
        late = _halves(x, factor.shape[-3]).select(-3, 1)
        halves.append((late.unflatten(-2, (factor.shape[-2], -1)) * factor.unsqueeze(-2)).flatten(-3, -2))
    return Readers(x, halves)


def writers(x: Tensor, decay: ChannelDecay) -> Writers:
    """x [..., C, M] as the side that is read."""
    return Writers(x, [_halves(x, factor.shape[-3]).select(-3, 0) * factor for factor in decay.before])


def contract(r: Readers, w: Writers) -> Tensor:
    """R_ij = sum_m r_im exp(P_im - P_jm) w_jm for j <= i, else 0; [..., C * G, C]."""
    steps = w.whole.shape[-2]
    product = w.whole.new_zeros(*r.whole.shape[:-1], steps)
    groups = r.whole.unflatten(-2, (steps, -1))
    product.unflatten(-2, (steps, -1)).diagonal(dim1=-3, dim2=-1).copy_((groups @ w.whole.unsqueeze(-1))[..., 0].mT)
    for late, early in zip(r.halves, w.halves, strict=True):
        _blocks(product, late.shape[-3]).copy_((late @ early.mT).movedim(-3, -1))
    return product


def spread(scores: Tensor, w: Writers, decay: ChannelDecay) -> Tensor:
    """y_im = sum_{j < i} scores_ij exp(P_im - P_jm) w_jm for scores [..., C * G, C]; [..., C * G, M]."""
    y = scores.new_zeros(*scores.shape[:-1], w.whole.shape[-1])
    for factor, early in zip(decay.after, w.halves, strict=True):
        arriving = _blocks(scores, factor.shape[-3]).movedim(-1, -3) @ early
        late = _halves(y, factor.shape[-3]).select(-3, 1).unflatten(-2, (factor.shape[-2], -1))
        late.addcmul_(arriving.unflatten(-2, (factor.shape[-2], -1)), factor.unsqueeze(-2))
    return y


def own_scores(scores: Tensor) -> Tensor:
    """The scores of each step with itself, [..., C, G]."""
    return scores.unflatten(-2, (scores.shape[-1], -1)).diagonal(dim1=-3, dim2=-1).mT


def spread_own(own: Tensor, w: Writers) -> Tensor:
    """What spread leaves out, scores_ii w_im: it does not decay."""
    return (own.unsqueeze(-1) * w.whole.unsqueeze(-2)).flatten(-3, -2)


def spread_back(scores: Tensor, r: Readers, decay: ChannelDecay) -> Tensor:
    """y_jm = sum_{i > j} scores_ij exp(P_im - P_jm) r_im for scores [..., C * G, C]; [..., C, M]."""
    y = scores.new_zeros(*scores.shape[:-2], scores.shape[-1], r.whole.shape[-1])
    for factor, late in zip(decay.before, r.halves, strict=True):
        arriving = _blocks(scores, factor.shape[-3]).movedim(-1, -3).mT @ late
        _halves(y, factor.shape[-3]).select(-3, 0).addcmul_(arriving, factor)
    return y


def spread_back_own(own: Tensor, r: Readers) -> Tensor:
    """What spread_back leaves out, scores_jj r_jm, summed over the group."""
    return (own.unsqueeze(-2) @ r.whole.unflatten(-2, (own.shape[-2], -1))).squeeze(-2)


def _halves(x: Tensor, blocks: int) -> Tensor:
    """[..., C * G, width] to [..., blocks, 2, C * G / (2 blocks), width]."""
    return x.unflatten(-2, (blocks, 2, -1))


def _blocks(scores: Tensor, blocks: int) -> Tensor:
    """The entries of [..., C * G, C] in which a later half reads an earlier one, [..., h * G, h, blocks]."""
    cut = scores.unflatten(-2, (blocks, 2, -1)).unflatten(-1, (blocks, 2, -1))
    return cut.select(-5, 1).select(-2, 0).diagonal(dim1=-4, dim2=-2)
