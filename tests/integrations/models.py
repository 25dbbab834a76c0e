"""Tiny models of transformers with random weights, one for each architecture that fla_ops serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

TOKENS = {"vocab_size": 64, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
COMMON = {**TOKENS, "initializer_range": 0.2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 12, "mamba_chunk_size": 16}
SINKS = {
    **COMMON,
    **ATTENTION,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "sliding_window": 9,
    "max_position_embeddings": 512,
}

DELTA = {
    **COMMON,
    **ATTENTION,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 8,
    "max_position_embeddings": 512,
}
EXPERTS = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": (
        "Mamba2",
        {
            **COMMON,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 12,
            "n_groups": 2,
            "num_hidden_layers": 2,
            "chunk_size": 16,
            "expand": 2,
        },
    ),
    "bamba": ("Bamba", {**COMMON, **ATTENTION, **MAMBA, "num_hidden_layers": 2, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1", {**COMMON, **ATTENTION, **MAMBA, "num_hidden_layers": 2, "mamba_d_ssm": 64}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **COMMON,
            **ATTENTION,
            **MAMBA,
            "num_hidden_layers": 2,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **COMMON,
            **ATTENTION,
            "head_dim": 8,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "attention", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 12,
            "chunk_size": 16,
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            **COMMON,
            **ATTENTION,
            "num_hidden_layers": 2,
            "mamba_d_state": 12,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 2,
            "chunk_size": 16,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "use_shared_attention_adapter": False,
        },
    ),
    "minimax": (
        "MiniMax",
        {
            **COMMON,
            **ATTENTION,
            "head_dim": 8,
            "num_hidden_layers": 2,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "block_size": 16,
            "layer_types": ["full_attention", "linear_attention"],
        },
    ),
    "qwen3_next": ("Qwen3Next", {**DELTA, **EXPERTS}),
    "qwen3_5": ("Qwen3_5Text", DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeText", {**DELTA, **EXPERTS}),
    "olmo_hybrid": ("OlmoHybrid", {**DELTA, "linear_num_value_heads": 2}),
    "gpt_oss": (
        "GptOss",
        {
            **SINKS,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attn_implementation": "eager",
        },
    ),
    "granite_swa": ("GraniteSWA", {**SINKS, "attn_implementation": "eager"}),
    "granitemoe_swa": (
        "GraniteMoeSWA",
        {**SINKS, "num_local_experts": 3, "num_experts_per_tok": 2, "attn_implementation": "eager"},
    ),
    "mimo_v2_flash": (
        "MiMoV2Flash",
        {
            **SINKS,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "attn_implementation": "eager",
        },
    ),
    "llama": ("Llama", {**SINKS, "attn_implementation": "eager"}),
    "mistral": ("Mistral", {**SINKS, "attn_implementation": "eager"}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **SINKS,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "use_sliding_window": True,
            "max_window_layers": 0,
            "attn_implementation": "eager",
        },
    ),
    "gemma2": ("Gemma2", {**SINKS, "attn_implementation": "eager"}),
}

SCANS = ("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2")
DELTA_RULE = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid")
RECURRENT = (*SCANS, "minimax", *DELTA_RULE)
SOFTMAX = ("gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "llama", "mistral", "qwen2_moe")
EVERY = (*RECURRENT, *SOFTMAX)


def build(name: str, **changes: Any) -> Any:
    """One model in evaluation mode; what starts as a constant is drawn, so that no gradient is zero by symmetry."""
    prefix, settings = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**settings, **changes})
    model = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")(config)
    for key, parameter in model.named_parameters():
        draw(key.rpartition(".")[2], parameter)
    return model.eval()


@torch.no_grad()
def draw(name: str, parameter: nn.Parameter) -> None:
    """Random values, of the size that training leaves there."""
    if name == "A_log":
        parameter.uniform_(-1, 1)
    elif name == "dt_bias":
        parameter.normal_(-1.5, 1)
    elif name in ("D", "sinks"):
        parameter.normal_()


def prompt(batch: int = 2, time: int = 37) -> Tensor:
    """Tokens other than the padding."""
    return torch.randint(1, 64, (batch, time), generator=torch.Generator().manual_seed(3))


def padding(tokens: Tensor, side: str) -> Tensor:
    """A mask in which one row is padded, on the left or on the right."""
    mask = torch.ones_like(tokens)
    if side == "left":
        mask[1, :11] = 0
    else:
        mask[0, 26:] = 0
    return mask
