"""fla's short convolution as ATen. Its state holds the last W inputs, [N, D, W]; a step reads W - 1 of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_ops.integrations import mamba
from fla_ops.integrations.fla.refusing import refuse
from fla_ops.integrations.fla.replacing import replaces


@replaces("fla.modules.causal_conv1d.ops:causal_conv1d")
def causal_conv1d(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    activation: mamba.Activation | None = None,
    backend: str | None = "triton",
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """x [B, T, D], weight [D, W]: o_t = activation(bias + sum_i weight_i x_{t - W + 1 + i}) + residual_t."""
    refuse("causal_conv1d", cp_context=cp_context, **kwargs)
    if weight is None:
        raise NotImplementedError("fla_ops serves causal_conv1d with a weight [D, W], got None")
    if cu_seqlens is not None:
        o = _packed(x, weight, bias, initial_state, cu_seqlens)
        o = (o if activation is None else F.silu(o)).to(x.dtype)
        final = _packed_state(x, weight.shape[1], initial_state, cu_seqlens) if output_final_state else None
    else:
        before = None if initial_state is None else initial_state[..., 1:]
        o = mamba.causal_conv1d_fn(x.mT, weight, bias, initial_states=before, activation=activation).mT
        final = _state(x, weight.shape[1], before) if output_final_state else None
    return o if residual is None else o + residual, final


@replaces("fla.modules.causal_conv1d.ops:causal_conv1d_update")
def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: mamba.Activation | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of N sequences, x [N, D], [N, 1, D] or [1, N, D]; cache [N, D, W] takes it up, in place."""
    if weight is None:
        raise NotImplementedError("fla_ops serves causal_conv1d_update with a weight [D, W], got None")
    o = mamba.causal_conv1d_update(x.reshape(cache.shape[:2]), cache, weight, bias, activation).view(x.shape)
    return o if residual is None else o + residual, cache


@replaces("fla.modules.causal_conv1d.ops:ShortConvolution.forward")
def short_convolution(
    self: Any,
    x: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    cache: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As fla's, without looking at a value: steps of packed sequences return a new state, where fla's change the cache
    if each sequence has one step.
    """
    if mask is not None:
        if cu_seqlens is not None:
            raise ValueError("`mask` and `cu_seqlens` cannot be provided at the same time")
        x = x * mask[..., None]
    weight, activation = self.weight[:, 0], self.activation
    if cache is not None and cu_seqlens is None and x.shape[1] == 1 and not torch.is_grad_enabled():
        o, cache = causal_conv1d_update(x, cache, residual, weight, self.bias, activation)
        return o, cache if output_final_state else None
    return causal_conv1d(
        x,
        weight,
        self.bias,
        residual,
        cache,
        output_final_state,
        activation,
        cu_seqlens=cu_seqlens,
        **kwargs,
    )


def _state(x: Tensor, taps: int, before: Tensor | None) -> Tensor:
    """The last W inputs; before [B, D, W - 1] are those that came before x."""
    x = x[:, -taps:].mT
    if before is None:
        return F.pad(x, (taps - x.shape[-1], 0)).contiguous()
    return torch.cat([before.to(x.dtype), x], -1)[..., -taps:].contiguous()


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """The convolution tap by tap, each taken from the state where it would reach into another sequence."""
    sequence, position = _places(x, cu_seqlens)
    taps = weight.shape[1]
    o = x * weight[:, -1]
    for lag in range(1, taps):
        earlier = F.pad(x, (0, 0, lag, 0))[:, : x.shape[1]] * (position >= lag)[:, None]
        if state is not None:
            column = (taps + position - lag).clamp(max=taps - 1)
            earlier = earlier + state[sequence, :, column].to(x.dtype) * (position < lag)[:, None]
        o = o + earlier * weight[:, -1 - lag]
    return o if bias is None else o + bias


def _packed_state(x: Tensor, taps: int, state: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """[N, D, W], the last W inputs of each sequence; a shorter one keeps the newest of what came before it."""
    position = (cu_seqlens[1:] - cu_seqlens[:-1])[:, None] + torch.arange(-taps, 0, device=x.device)  # [N, W]
    new = position >= 0
    last = x[0, (cu_seqlens[:-1, None] + position).clamp(min=0)] * new[..., None]
    last = last.mT
    if state is not None:
        column = (taps + position).clamp(max=taps - 1)[:, None].expand_as(last)
        last = last + state.to(x.dtype).gather(2, column) * ~new[:, None]
    return last.contiguous()


def _places(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """[T] each: the sequence of a step, and its position there."""
    steps = torch.arange(x.shape[1], device=x.device)
    sequence = torch.searchsorted(cu_seqlens, steps, right=True) - 1
    return sequence, steps - cu_seqlens[sequence]
