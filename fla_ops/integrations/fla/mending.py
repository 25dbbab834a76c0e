"""Parts of fla that run on a CPU too, but stop a trace, drop an argument or refuse what they need not."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_ops.integrations.fla.replacing import adapts


def _remembers_nothing_in_a_trace(function: Callable[..., Any]) -> Callable[..., Any]:
    """fla remembers what these computed of which tensor. A trace has tensors that never exist."""
    own = inspect.unwrap(function)

    @wraps(own)
    def run(*args: Any, **kwargs: Any) -> Any:
        return (own if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return run


for name in (
    "fla.layers.utils:_get_unpad_indices_and_cu",
    "fla.layers.utils:_get_last_token_unpad_indices_and_cu",
    "fla.ops.utils.index:prepare_lens_from_mask",
    "fla.ops.utils.index:prepare_cu_seqlens_from_lens",
    "fla.ops.utils.index:prepare_cu_seqlens_from_mask",
):
    adapts(name)(_remembers_nothing_in_a_trace)


@adapts("fla.layers.utils:get_unpad_data")
def _unpad_data(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(inspect.unwrap(theirs))
    def get_unpad_data(attention_mask: Tensor) -> tuple[Tensor, Tensor, int]:
        """A trace cannot read the longest length back: its bound stands for it, all steps of the mask [B, T]."""
        if not torch.compiler.is_compiling():
            data: tuple[Tensor, Tensor, int] = theirs(attention_mask)
            return data
        offsets = F.pad(attention_mask.sum(-1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
        return attention_mask.flatten().nonzero().flatten(), offsets, attention_mask.shape[-1]

    return get_unpad_data


@adapts("fla.models.cache_utils:FLACache.from_legacy_cache")
def _cache_in_a_trace(theirs: Any) -> Any:
    """fla keeps the compiler out, with no need."""
    return classmethod(inspect.unwrap(theirs.__func__))


@adapts("fla.models.linear_attn.modeling_linear_attn:LinearAttentionForCausalLM.forward")
def _with_its_arguments(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """fla's drops cu_seqlens on the way to the layers; what its other models share is the same, and does not."""
    shared: Callable[..., Any] = importlib.import_module("fla.models.modeling_utils").FLAForCausalLM.forward
    return shared


@adapts("fla.layers.forgetting_attn:ForgettingAttention.forward")
def _with_a_mask(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """fla's takes a step after a cache only with a mask, and generate() gives none where nothing is padded."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is None and past_key_values is not None:
            cached = past_key_values.get_seq_length(self.layer_idx)
            if cached > 0:
                batch, time, _ = hidden_states.shape
                attention_mask = hidden_states.new_ones(batch, cached + time, dtype=torch.long)
        return theirs(self, hidden_states, attention_mask, past_key_values, output_attentions, use_cache, **kwargs)

    return forward
