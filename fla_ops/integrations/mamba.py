"""The functions of mamba_ssm and causal_conv1d that Mamba-2 needs, by their names and signatures.

    from fla_ops.integrations.mamba import mamba_chunk_scan_combined, selective_state_update
    from fla_ops.integrations.mamba import causal_conv1d_fn, causal_conv1d_update

They run on any device, trace under torch.compile(fullgraph=True) and torch.export, and have every gradient. The scan
and the step are ssd and ssd_step_, whose arguments have the same names; activations keep their dtype, decays and states
are float32 (float64 for float64 inputs). The convolutions are causal_conv and its step; those with seq_idx, or a ring
for a state, are ATen calls.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fla_ops

NO_LIMIT = (0.0, math.inf)
Activation = Literal["silu", "swish"]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """Mamba-2 over a whole sequence: S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T, o_t = (S_t C_t + D x_t) silu(z_t).

    Args:
        x: [B, T, H, P]. dt: [B, T, H]. A: [H], negative. B, C: [B, T, G, N], each group serves H // G heads.
        chunk_size: accepted and not used: the operator has its own.
        D: [H] or [H, P]. z: as x. dt_bias: [H].
        initial_states: [B, H, P, N]; with cu_seqlens one for each sequence; with seq_idx they go to sequence 0.
        seq_idx: [B, T], integers: a state ends where the number changes.
        cu_seqlens: [sequences + 1], offsets of sequences packed into a batch of 1. They alone separate the sequences,
            beside seq_idx they are taken in its place (mamba_ssm wants both).
        dt_softplus, dt_limit: what dt + dt_bias goes through.
        return_final_states: also return the state after the last step, [B, H, P, N].
        return_varlen_states: also return the state after each sequence of cu_seqlens, [sequences, H, P, N].

    Returns:
        o [B, T, H, P] in x's dtype, alone or before the states that were asked for.
    """
    batch, time, heads, width = _sizes("x", x, "[B, T, H, P]")
    _shape("dt", dt, "[B, T, H]", (batch, time, heads))
    _shape("A", A, "[H]", (heads,))
    _shape("dt_bias", dt_bias, "[H]", (heads,))
    _shape("z", z, "[B, T, H, P]", (batch, time, heads, width))
    _shape("seq_idx", seq_idx, "[B, T]", (batch, time))
    if D is not None and D.dim() != 1:
        _shape("D", D, "[H] or [H, P]", (heads, width))
    else:
        _shape("D", D, "[H] or [H, P]", (heads,))
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("return_varlen_states needs cu_seqlens, the offsets [sequences + 1], got None")
    o, states = fla_ops.ssd(
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus,
        dt_limit,
        initial_state=initial_states,
        output_final_state=return_final_states or return_varlen_states,
        seq_idx=seq_idx if cu_seqlens is None else None,
        cu_seqlens=cu_seqlens,
    )
    o = o.to(x.dtype)
    final = () if not return_final_states else (states if cu_seqlens is None or states is None else states[-1:],)
    varlen = (states,) * return_varlen_states
    return (o, *final, *varlen) if final or varlen else o


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of Mamba-2, in place: the state changes as mamba_chunk_scan_combined changes it.

    dt, A and dt_bias are those of Mamba-2: one number for each head, expanded (stride 0) over its channels. Where a
    gradient is asked for, autograd records the step.

    Args:
        state: [B, H, P, N], or a pool of P' rows with state_batch_indices.
        x: [B, H, P]. dt: [B, H, P]. A: [H, P, N]. B, C: [B, G, N]. D: [H, P]. z: as x. dt_bias: [H, P].
        dt_softplus: whether dt + dt_bias goes through softplus.
        state_batch_indices: [B] integers, the pool row of each sequence; -1 reads and writes nothing, and its
            output is zero. No gradient then.

    Returns:
        o [B, H, P] in x's dtype.

    Raises:
        NotImplementedError: if dt, A or dt_bias differ between the channels of a head, as in Mamba-1.
    """
    batch, heads, width = _sizes("x", x, "[B, H, P]")
    _shape("dt", dt, "[B, H, P]", (batch, heads, width))
    _shape("A", A, "[H, P, N]", (heads, width, state.shape[-1]))
    _shape("D", D, "[H, P]", (heads, width))
    _shape("dt_bias", dt_bias, "[H, P]", (heads, width))
    _shape("z", z, "[B, H, P]", (batch, heads, width))
    step, rate = _of_head("dt", dt, 1), _of_head("A", A, 2)
    bias = None if dt_bias is None else _of_head("dt_bias", dt_bias, 1)
    tensors = (state, x, step, rate, B, C, D, z, bias)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if state_batch_indices is None and (recorded or x.dtype == torch.float64):
        x, step, B, C = (t[:, None] for t in (x, step, B, C))
        z = None if z is None else z[:, None]
        # The state is about to change, and the gradient needs what it was.
        inputs = (x, step, rate, B, C, D, z, bias, dt_softplus, NO_LIMIT, state.clone())
        o, final = fla_ops.ssd(*inputs, output_final_state=True, mode="fused_recurrent")
        state.copy_(final)
        o = o[:, 0]
    else:
        o = fla_ops.ssd_step_(x, step, rate, B, C, state, D, z, bias, dt_softplus, state_batch_indices)
    return o.to(x.dtype)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: Activation | None = None,
) -> Any:
    """Depthwise causal convolution: o_t = activation(bias + sum_i weight_i x_{t - W + 1 + i}).

    Args:
        x: [B, D, T]. weight: [D, W]. bias: [D].
        seq_idx: [B, T], integers: nothing reaches over a place where the number changes. Without states.
        initial_states: [B, D, W - 1], what came before x; None means zeros.
        return_final_states: also return the last W - 1 steps, in final_states_out where that is given.
        activation: None, "silu" or "swish".

    Returns:
        o [B, D, T] in x's dtype, or (o, final_states [B, D, W - 1]).
    """
    batch, channels, time = _sizes("x", x, "[B, D, T]")
    before = weight.shape[-1] - 1
    _shape("weight", weight, "[D, W]", (channels, before + 1))
    _shape("bias", bias, "[D]", (channels,))
    _shape("seq_idx", seq_idx, "[B, T]", (batch, time))
    _shape("initial_states", initial_states, "[B, D, W - 1]", (batch, channels, before))
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise ValueError("seq_idx goes without states, got initial_states or return_final_states beside it")
        o = _separate(x.to(weight.dtype), weight, bias, seq_idx)
        return _activate(o, activation).to(x.dtype)
    o, final = fla_ops.causal_conv(x.mT, weight, bias, initial_states, return_final_states, activation)
    if final is None:
        return o.mT
    return o.mT, final.to(x.dtype) if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution of the newest steps; conv_state takes them up, in place.

    Args:
        x: [B, D] or [B, D, T]. weight: [D, W]. bias: [D].
        conv_state: [B, D, S] with S >= W - 1, the steps before x; or a pool of rows with conv_state_indices.
        activation: None, "silu" or "swish".
        cache_seqlens: [B], integers: conv_state is a ring, in which x goes to cache_seqlens % S and after it.
        conv_state_indices: [B], integers, the pool row of each sequence, all different; -1 reads and writes nothing,
            and its output is zero.

    Returns:
        o in x's shape and dtype.
    """
    if x.dim() == 2:
        o = causal_conv1d_update(x[..., None], conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
        return o[..., 0]
    batch, channels, time = _sizes("x", x, "[B, D, T] or [B, D]")
    taps, length = weight.shape[-1], conv_state.shape[-1]
    _shape("weight", weight, "[D, W]", (channels, taps))
    _shape("bias", bias, "[D]", (channels,))
    rows = conv_state.shape[0] if conv_state_indices is not None else batch
    _shape("conv_state", conv_state, "[B, D, S]", (rows, channels, length))
    if length < taps - 1:
        raise ValueError(f"conv_state must hold at least W - 1 = {taps - 1} steps, got {length}")
    tensors = (x, conv_state, weight, bias)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if time == 1 and cache_seqlens is None and not recorded:
        step = (x[..., 0], conv_state, weight, bias, activation, conv_state_indices)
        return fla_ops.causal_conv_step_(*step)[..., None]
    present, state = None, conv_state
    if conv_state_indices is not None:
        present = conv_state_indices >= 0
        state = conv_state[conv_state_indices.clamp(min=0)]
    if cache_seqlens is None:
        window = torch.cat([state, x.to(state.dtype)], -1)
        new = window[..., -length:]
    else:
        ring = cache_seqlens[:, None] + torch.arange(1 - taps, time, device=x.device)
        ring = ring.remainder(length)[:, None].expand(-1, channels, -1)
        window = torch.cat([state.gather(2, ring[..., : taps - 1]), x.to(state.dtype)], -1)
        new = state.scatter(2, ring[..., taps - 1 :], x.to(state.dtype))
    o = _activate(_newest(window.to(weight.dtype), weight, bias, time), activation).to(x.dtype)
    if conv_state_indices is None or present is None:
        conv_state.copy_(new)
        return o
    # Padding writes once more what the first sequence writes, or, without one, what row 0 holds.
    source = torch.where(present, torch.arange(batch, device=x.device), present.int().argmax())
    new = torch.where(present[:, None, None], new, state)
    conv_state.index_put_((conv_state_indices.clamp(min=0)[source],), new[source])
    return o * present[:, None, None]


def _sizes(name: str, x: Tensor, letters: str) -> torch.Size:
    if x.dim() != letters.partition(" or ")[0].count(",") + 1:
        raise ValueError(f"{name} must be {letters}, got {tuple(x.shape)}")
    return x.shape


def _shape(name: str, x: Tensor | None, letters: str, sizes: tuple[int, ...]) -> None:
    if x is not None and x.shape != sizes:
        raise ValueError(f"{name} must be {letters} = {sizes}, got {tuple(x.shape)}")


def _of_head(name: str, x: Tensor, axes: int) -> Tensor:
    """The one number that the last axes repeat."""
    sizes, strides = x.shape[-axes:], x.stride()[-axes:]
    if any(size != 1 and stride != 0 for size, stride in zip(sizes, strides, strict=True)):
        raise NotImplementedError(
            f"{name} must be one number for each head, expanded over the last {axes} axes (stride 0), as Mamba-2 has "
            f"it; got strides {tuple(x.stride())} for {tuple(x.shape)}"
        )
    return x[..., 0] if axes == 1 else x[..., 0, 0]


def _activate(o: Tensor, activation: str | None) -> Tensor:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, silu or swish, got {activation!r}")
    return o if activation is None else F.silu(o)


def _newest(window: Tensor, weight: Tensor, bias: Tensor | None, time: int) -> Tensor:
    """The last `time` steps of the convolution over a window that begins early enough."""
    taps = weight.shape[-1]
    if time == 1:  # a product and a sum cost less than to set up a convolution
        o = (window[..., -taps:] * weight).sum(-1, keepdim=True)
        return o if bias is None else o + bias[:, None]
    return F.conv1d(window, weight[:, None], bias, groups=window.shape[1])[..., -time:]


def _separate(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor) -> Tensor:
    """The convolution tap by tap, each masked where it would reach into another sequence."""
    time, taps = x.shape[-1], weight.shape[-1]
    o = x * weight[:, -1:]
    for lag in range(1, taps):
        same = seq_idx == F.pad(seq_idx, (lag, 0))[:, :time]
        earlier = F.pad(x, (lag, 0))[..., :time]
        o = o + earlier * same[:, None] * weight[:, -1 - lag, None]
    return o if bias is None else o + bias[:, None]
