"""Decay factors inside and across chunks, for ATen implementations.

A running sum of log decays loses the small ones behind a large one, and -inf makes NaN. So a step whose decay is
below `floor` counts as a reset instead of entering the sum: a weight is zero when a reset lies between its two steps,
and the difference of two sums is taken before exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

NEVER = float("-inf")
SPLIT = {
    torch.float32: 40.0,
    torch.float64: 300.0,
}  # how much a chunk may decay for its weights to be split into two factors


def floor(dtype: torch.dtype) -> float:
    """A log decay at or below this is zero to `dtype`. Products stay far above denormals, which slow a CPU's matrix
    products.
    """
    return -80.0 if dtype is torch.float64 else -30.0


@dataclass(frozen=True)
class Decay:
    """Factors of one chunk layout, shaped to broadcast against [rows, lanes, HK, G, C, D]."""

    within: Tensor  # [..., C, C]: from step j to step i of a chunk, zero above the diagonal
    from_start: Tensor  # [..., C, 1]: of the incoming state at step i
    to_end: Tensor  # [..., C, 1]: of step j at the chunk's end
    total: Tensor  # [..., 1, 1]: of the incoming state at the chunk's end
    alive: Tensor  # [..., C]: False at resets, whose decay has no gradient


@dataclass(frozen=True)
class Factors:
    """The decay of a chunk split between its two steps, relative to the chunk's end: D_ij = row_i column_j.

    Only for chunks whose whole decay is mild: row_i = exp(P_i - P_C) >= 1 must stay far from overflow.
    """

    row: Tensor  # [..., C, 1]
    column: Tensor  # [..., C, 1]
    total: Tensor  # [..., 1, 1]
    log_total: Tensor  # [..., 1]

    @cached_property
    def across(self) -> Tensor:
        """From the state before row j to what row i reads of it, [lanes * heads, rows + 1, rows + 1] for one sequence a
        lane: j = 0 is the initial state, i = rows the final one. Its transpose serves the gradient.
        """
        total = self.log_total[..., 0].flatten(1).T.double()
        before = torch.nn.functional.pad(total.cumsum(1), (1, 0))  # over the rows before each, and over all
        dtype = self.total.dtype
        # Readers hold up to exp(SPLIT) against their own row's decay: only what decays before it may be dropped.
        weight = torch.threshold_(before[:, :, None] - before[:, None, :], floor(dtype), NEVER).exp_().tril_()
        return (weight * torch.nn.functional.pad(total, (0, 1)).exp_()[:, :, None]).to(dtype)


def chunk_size(g: Tensor, largest: int) -> int:
    """The largest chunk size up to `largest`, at least 16, whose chunks of g [B, T, heads] all split into factors;
    `largest` where there is none. Reads the values.
    """
    sizes, padded = [largest], g
    if g.shape[1] % largest:
        padded = torch.nn.functional.pad(g, (0, 0, 0, -g.shape[1] % largest))
    while sizes[-1] >= 32:
        sizes.append(sizes[-1] // 2)
    for size in sizes:
        if g.numel() == 0 or -padded.unflatten(1, (-1, size)).sum(2).amin() < SPLIT[torch.float32]:
            return size
    return largest


def factors(g: Tensor) -> Factors | None:
    """The split form of log decays g [..., C], or None where a chunk decays too strongly for it. Reads the values:
    eager code only.
    """
    sums = g.cumsum(-1)
    end = sums[..., -1:]
    if g.numel() == 0 or not -end.amin() < SPLIT[g.dtype] or g.amax() > 0:
        return None
    return Factors((sums - end).exp_()[..., None], (end - sums).exp_()[..., None], end.exp()[..., None], end)


def per_step(g: Tensor) -> Decay:
    """Decay factors of log decays g [..., C]."""
    reset, sums, count = _sums(g)
    return Decay(
        _within(sums, count),
        _exp(sums, count > 0)[..., None],
        _exp(sums[..., -1:] - sums, count < count[..., -1:])[..., None],
        _exp(sums[..., -1:], count[..., -1:] > 0)[..., None],
        ~reset,
    )


def constant(gamma: Tensor, size: int, lengths: Tensor) -> Decay:
    """Decay factors of one log decay per head, gamma [HK, G], for rows of `lengths` [rows] steps out of `size`."""
    step = torch.arange(1, size + 1, device=gamma.device, dtype=gamma.dtype)
    reset = gamma[..., None] <= floor(gamma.dtype)
    slope = gamma[..., None].masked_fill(reset, 0)
    sums, count = slope * step, torch.where(reset, step, 0)
    left = (lengths[:, None, None, None, None] - step).clamp_(min=0)  # steps after step j of the row
    steps = lengths[:, None, None, None, None].to(gamma.dtype)
    return Decay(
        _within(sums, count)[None, None],
        _exp(sums, count > 0)[None, None, ..., None],
        _exp(slope * left, reset & (left > 0))[..., None],
        _exp(slope * steps, reset & (steps > 0))[..., None],
        ~reset,
    )


def _sums(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the resets are, the running sum of the other steps, the running count of resets."""
    reset = g <= floor(g.dtype)
    return reset, g.masked_fill(reset, 0).cumsum(-1), reset.cumsum(-1)


def _exp(exponent: Tensor, crossed: Tensor) -> Tensor:
    """exp, exactly zero where a reset was crossed or the decay is below the floor."""
    kept = torch.where(crossed, NEVER, exponent)
    return torch.threshold_(kept, floor(exponent.dtype), NEVER).exp_()


def _within(sums: Tensor, count: Tensor) -> Tensor:
    size = sums.shape[-1]
    above = torch.ones(size, size, dtype=torch.bool, device=sums.device).triu_(1)
    exponent = sums[..., :, None] - sums[..., None, :]
    hidden = above | (count[..., :, None] != count[..., None, :])
    exponent.masked_fill_(hidden, NEVER)
    return torch.threshold_(exponent, floor(sums.dtype), NEVER).exp_()
