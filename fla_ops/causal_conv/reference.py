"""The definition of causal_conv: one filter of W taps for each channel, over the step and the W - 1 before it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = act(bias + sum_i weight_i x_{t - W + 1 + i}), [B, T, D], and the last W - 1 steps, [N, D, W - 1]."""
    if cu_seqlens is not None:
        states = [None] * (len(cu_seqlens) - 1) if initial_state is None else initial_state.split(1)
        parts = [
            convolve(x[:, start:end], weight, bias, state, activation)
            for (start, end), state in zip(pairwise(cu_seqlens.tolist()), states, strict=True)
        ]
        outputs, finals = zip(*parts, strict=True)
        return torch.cat(outputs, 1), torch.cat(finals)
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    (batch, time, channels), taps = x.shape, weight.shape[1]
    before = x.new_zeros(batch, channels, taps - 1) if initial_state is None else initial_state
    steps = torch.cat([before.to(dtype), x.to(dtype).mT], -1)
    seen = torch.stack([steps[..., i : i + time] for i in range(taps)], -1)
    o = (weight[:, None].to(dtype) * seen).sum(-1)
    o = o if bias is None else o + bias[:, None].to(dtype)
    o = o if activation is None else silu(o)
    return o.mT.to(x.dtype), steps[..., time:]


def step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step for each sequence, o [N, D], and the pool [P, D, S] after it: the last S steps."""
    rows = torch.arange(len(x), device=x.device) if slots is None else slots.long()
    o, pool, before = torch.zeros_like(x), state.clone(), weight.shape[1] - 1
    used = (rows >= 0).nonzero().squeeze(1)
    held, newest = state[rows[used]].to(x.dtype if x.dtype is torch.float64 else torch.float32), x[used, None]
    recent = held[..., held.shape[-1] - before :]
    o[used] = convolve(newest, weight, bias, recent, activation)[0][:, 0]
    pool[rows[used]] = torch.cat([held, newest.mT.to(held.dtype)], -1)[..., 1:].to(pool.dtype)
    return o, pool
