"""Tiny models of flash-linear-attention with random weights, one for each way that fla_ops serves."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from fla_ops.attn import reference as attn
from fla_ops.gsa import reference as gsa
from fla_ops.linear_attn import reference as linear_attn
from fla_ops.simple_gla import reference as simple_gla

with warnings.catch_warnings():  # fla warns that there is no GPU, and no flash-attn
    warnings.simplefilter("ignore")
    models = pytest.importorskip(
        "fla.models", reason="flash-linear-attention is not installed: `make test` installs it"
    )

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gsa": ("GSA", {"num_slots": 8, "use_short_conv": True}),
    "gsa, two groups of heads, residuals attended to": (
        "GSA",
        {"num_slots": 8, "num_heads": 4, "num_kv_heads": 2, "attnres_block_size": 2},
    ),
    "gsa and attention": ("GSA", {"num_slots": 8, "attn": {"layers": [1], "num_heads": 2}}),
    "retnet": ("RetNet", {"use_short_conv": True}),
    "linear_attn": ("LinearAttention", {}),
    "transformer": ("Transformer", {"num_heads": 4, "num_kv_heads": 2, "window_size": 9, "qk_norm": True}),
    "forgetting_transformer": ("ForgettingTransformer", {"use_output_gate": True, "qk_norm": True}),
    "mamba2": ("Mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 12, "n_groups": 2, "expand": 2}),
}
EVERY = tuple(CONFIGS)
ONE_STEP = ("forgetting_transformer",)  # fla's layer takes no more after a cache
NOT_PACKED = ("linear_attn",)  # fla's model takes no cu_seqlens; the layer does


def build(name: str, **changes: Any) -> Any:
    """One model in evaluation mode; what starts as a constant is drawn, so that no gradient is zero by symmetry."""
    prefix, settings = CONFIGS[name]
    settings = {**COMMON, **settings, **changes}
    if prefix == "Mamba2":
        del settings["intermediate_size"]
    torch.manual_seed(0)
    model = getattr(models, f"{prefix}ForCausalLM")(getattr(models, f"{prefix}Config")(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.unique().numel() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def prompt(batch: int = 2, time: int = 37) -> Tensor:
    """Tokens other than the padding."""
    return torch.randint(1, 64, (batch, time), generator=torch.Generator().manual_seed(3))


def left_padding(tokens: Tensor) -> Tensor:
    """A mask in which the second row is padded."""
    mask = torch.ones_like(tokens)
    mask[1, :11] = 0
    return mask


def _simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    *_: Any,
    state_v_first: bool = False,
    **__: Any,
) -> tuple[Tensor, Tensor]:
    return simple_gla.recurrent(q, k, v, g, g_gamma, scale, None, False, state_v_first)


def _linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, _: Any, __: bool, normalize: bool, *___: Any
) -> tuple[Tensor, None]:
    return linear_attn.recurrent(q, k, v, scale, normalize=normalize)[0], None


def _attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    return attn.parallel(q, k, v, g, scale, window_size, cu_seqlens)[0]


# The equations, for what a training step calls of fla_ops.
REFERENCES: dict[str, Any] = {
    "simple_gla": _simple_gla,
    "chunk_simple_gla": _simple_gla,
    "chunk_gsa": lambda q, k, v, s, g, scale, *_: (gsa.recurrent(q, k, v, s, g, scale)[0], None),
    "chunk_linear_attn": _linear_attn,
    "fused_recurrent_gsa": lambda q, k, v, s, g, scale, *_: (gsa.recurrent(q, k, v, s, g, scale)[0], None),
    "parallel_attn": _attn,
}
