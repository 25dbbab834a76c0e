"""fla's Mamba-2 layer where it has no kernels of mamba_ssm: what it computes in PyTorch, by one operator."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fla_ops.integrations import mamba
from fla_ops.integrations.fla.convolution import causal_conv1d
from fla_ops.integrations.fla.replacing import adapts


@adapts("fla.layers.mamba2:Mamba2.forward")
def _mamba2_forward(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """fla's forward, which reads no cu_seqlens."""
    kernels = importlib.import_module("fla.layers.mamba2").is_fast_path_available
    caches = importlib.import_module("fla.layers.utils")

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        cu_seqlens = kwargs.get("cu_seqlens")
        if kernels and hidden_states.is_cuda and cu_seqlens is None:
            served: tuple[Tensor, None, Any] = theirs(
                self, hidden_states, attention_mask, past_key_values, use_cache, output_attentions, **kwargs
            )
            return served
        state = caches.get_layer_cache(self, past_key_values)
        if state is None and attention_mask is not None and attention_mask.shape == hidden_states.shape[:2]:
            hidden_states = (hidden_states * attention_mask[..., None]).to(hidden_states.dtype)
        else:
            attention_mask = None
        o, window, scanned = _mix(self, hidden_states, attention_mask, state, bool(use_cache), cu_seqlens)
        time = hidden_states.shape[1]
        caches.update_layer_cache(self, past_key_values, recurrent_state=scanned, conv_state=window, offset=time)
        return o, None, past_key_values

    return forward


def _mix(
    layer: Any,
    hidden_states: Tensor,
    mask: Tensor | None,
    state: dict[str, Any] | None,
    use_cache: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """hidden_states [B, T, D] to the layer's output, the last W inputs of its convolution and its state [B, H, P, N].

    After a cached state there may be any number of steps, where fla takes one. Padding is true to fla: no input of the
    convolution or the scan, but a decay.
    """
    groups = layer.n_groups * layer.ssm_state_size
    gate, x, dt = layer.in_proj(hidden_states).split([layer.intermediate_size, layer.conv_dim, layer.num_heads], -1)
    x = _masked(x, mask)
    window, before = (None, None) if state is None else (state["conv_state"], state["recurrent_state"])
    weight, bias = layer.conv1d.weight[:, 0], layer.conv1d.bias
    x, window = causal_conv1d(x, weight, bias, None, window, use_cache, cu_seqlens=cu_seqlens)
    x, B, C = _masked(layer.act(x), mask).split([layer.intermediate_size, groups, groups], -1)
    o, final = mamba.mamba_chunk_scan_combined(
        x.unflatten(-1, (layer.num_heads, -1)),
        dt,
        -layer.A_log.float().exp(),
        B.unflatten(-1, (layer.n_groups, -1)),
        C.unflatten(-1, (layer.n_groups, -1)),
        layer.chunk_size,
        layer._get_D(),
        dt_bias=layer.dt_bias,
        initial_states=before,
        cu_seqlens=cu_seqlens,
        dt_softplus=True,
        dt_limit=layer.dt_limit,
        return_final_states=cu_seqlens is None,
        return_varlen_states=cu_seqlens is not None,
    )
    o = o.flatten(-2)
    o = layer.norm(o, gate) if layer.rmsnorm else o * layer.act(gate)
    return layer.out_proj(o.to(hidden_states.dtype)), window, final


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else (x * mask[..., None]).to(x.dtype)
