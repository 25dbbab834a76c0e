"""Running sums of log decays, which keys a step still sees, and the gradient that comes back through the sums."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import FORGETS


def sums(g: Tensor) -> tuple[Tensor, Tensor]:
    """Of g [..., T]: the float64 running sum without steps that forget, and the last of those so far (0 for none)."""
    forgets = g <= FORGETS
    step = torch.arange(g.shape[-1], device=g.device)
    since = torch.where(forgets, step, 0)
    if g.shape[-1]:
        since = since.cummax(-1).values
    return g.double().masked_fill_(forgets, 0).cumsum(-1), since


def gradient(dsums: Tensor, g: Tensor, after: bool = False) -> Tensor:
    """dg [..., T] from the gradient of the running sums, in float64; none where a step forgets.

    If rows come `after` all steps, what they add to the last sum is what the columns take from the others.
    """
    wide = dsums.double()
    dg = wide - wide.cumsum(-1) if after else wide.flip(-1).cumsum(-1).flip(-1)
    return dg.masked_fill_(g <= FORGETS, 0)
