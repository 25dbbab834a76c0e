"""fla's operators, by its names and signatures: each is a call of fla_ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fla_ops
from fla_ops.integrations.fla.refusing import refuse
from fla_ops.integrations.fla.replacing import replaces


def _chunk_size(function: str, kwargs: dict[str, Any]) -> int | None:
    """The one keyword that fla's chunk forms read beside their parameters."""
    refuse(function, **{name: value for name, value in kwargs.items() if name != "chunk_size"})
    return kwargs.get("chunk_size")


@replaces("fla.ops.simple_gla.chunk:chunk_simple_gla")
def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    chunk_size = _chunk_size("chunk_simple_gla", kwargs)
    state = (initial_state, output_final_state, state_v_first)
    return fla_ops.chunk_simple_gla(q, k, v, g, g_gamma, scale, *state, cu_seqlens, cu_seqlens_cpu, chunk_size)


@replaces("fla.ops.simple_gla.fused_chunk:fused_chunk_simple_gla")
def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    state = (initial_state, output_final_state)
    return fla_ops.fused_chunk_simple_gla(q, k, v, g, g_gamma, scale, *state, cu_seqlens=cu_seqlens)


@replaces("fla.ops.simple_gla.fused_recurrent:fused_recurrent_simple_gla")
def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    refuse("fused_recurrent_simple_gla", **kwargs)
    state = (initial_state, output_final_state, reverse, state_v_first)
    return fla_ops.fused_recurrent_simple_gla(q, k, v, g, g_gamma, scale, *state, cu_seqlens)


@replaces("fla.ops.simple_gla.parallel:parallel_simple_gla")
def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Any:
    return fla_ops.parallel_simple_gla(q, k, v, g, scale, output_attentions, cu_seqlens, cu_seqlens_cpu)


def _retention_decay(q: Tensor) -> Tensor:
    """[H], log(1 - 2^-(5 + h)) for head h."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(q.shape[2], device=q.device, dtype=torch.float32)))


@replaces("fla.ops.retention.chunk:chunk_retention")
def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    chunk_size = _chunk_size("chunk_retention", kwargs)
    state = (initial_state, output_final_state)
    return fla_ops.chunk_simple_gla(
        q, k, v, None, _retention_decay(q), scale, *state, cu_seqlens=cu_seqlens, chunk_size=chunk_size
    )


@replaces("fla.ops.retention.fused_chunk:fused_chunk_retention")
def fused_chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    state = (initial_state, output_final_state)
    return fla_ops.fused_chunk_simple_gla(q, k, v, None, _retention_decay(q), scale, *state, cu_seqlens=cu_seqlens)


@replaces("fla.ops.retention.fused_recurrent:fused_recurrent_retention")
def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    refuse("fused_recurrent_retention", **kwargs)
    state = (initial_state, output_final_state, reverse, state_v_first)
    return fla_ops.fused_recurrent_simple_gla(q, k, v, None, _retention_decay(q), scale, *state, cu_seqlens)


@replaces("fla.ops.retention.parallel:parallel_retention")
def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    decay = _retention_decay(q)
    return fla_ops.parallel_simple_gla(q, k, v, None, scale, output_attentions, cu_seqlens, g_gamma=decay)


@replaces("fla.ops.linear_attn.chunk:chunk_linear_attn")
def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Any:
    return fla_ops.chunk_linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens)


@replaces("fla.ops.linear_attn.fused_chunk:fused_chunk_linear_attn")
def fused_chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Any:
    return fla_ops.fused_chunk_linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens)


@replaces("fla.ops.linear_attn.fused_recurrent:fused_recurrent_linear_attn")
def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    state = (initial_state, output_final_state, reverse)
    return fla_ops.fused_recurrent_linear_attn(q, k, v, scale, *state, normalize, cu_seqlens)


@replaces("fla.ops.lightning_attn.chunk:chunk_lightning_attn")
def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    chunk_size = _chunk_size("chunk_lightning_attn", kwargs)
    state = (initial_state, output_final_state)
    return fla_ops.chunk_lightning_attn(q, k, v, layer_idx, num_layers, scale, *state, cu_seqlens, chunk_size)


@replaces("fla.ops.lightning_attn.fused_recurrent:fused_recurrent_lightning_attn")
def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    state = (initial_state, output_final_state, reverse)
    return fla_ops.fused_recurrent_lightning_attn(q, k, v, layer_idx, num_layers, scale, *state, cu_seqlens)


@replaces("fla.ops.gsa.chunk:chunk_gsa")
def chunk_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    chunk_size = _chunk_size("chunk_gsa", kwargs)
    state = (initial_state, output_final_state, checkpoint_level)
    return fla_ops.chunk_gsa(q, k, v, s, g, scale, *state, cu_seqlens, cu_seqlens_cpu, chunk_size)


@replaces("fla.ops.gsa.fused_recurrent:fused_recurrent_gsa")
def fused_recurrent_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    return fla_ops.fused_recurrent_gsa(q, k, v, s, g, scale, initial_state, output_final_state, reverse, cu_seqlens)


@replaces("fla.ops.attn.parallel:parallel_attn")
def parallel_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    *,
    sink_bias: Tensor | None = None,
) -> Tensor:
    return fla_ops.parallel_attn(q, k, v, g, scale, window_size, cu_seqlens, chunk_indices, sink_bias=sink_bias)


@replaces("fla.ops.attn.decoding:attn_decoding_one_step")
def attn_decoding_one_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    do_gate_scale: bool = False,
    *,
    window_size: int | None = None,
    sink_bias: Tensor | None = None,
) -> Tensor:
    settings = (scale, cu_seqlens, do_gate_scale)
    return fla_ops.attn_decoding_one_step(q, k, v, g, *settings, sink_bias=sink_bias, window_size=window_size)


@replaces("fla.ops.forgetting_attn.parallel:parallel_forgetting_attn")
def parallel_forgetting_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    return fla_ops.parallel_attn(q, k, v, g, scale, window_size, cu_seqlens)
