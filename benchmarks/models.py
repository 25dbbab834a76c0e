"""Small models of transformers, on their own PyTorch code and on these operators in turn.

What is not replaced (projections, norms, experts) is in both times. Weights are random. A token is decoded after a
prompt; each implementation has a cache of its own, and both caches grow alike.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import fla_ops.integrations.transformers as integration

from .comparison import Row, Settings
from .peers import modeling
from .problems import FORWARD, TRAINING
from .timing import Implementation, measure

THEIRS, OURS = "transformers", "fla_ops"
TOKEN = "token"
PROMPT = 512  # steps before the tokens
PASSES = {FORWARD: (1, 1024), TRAINING: (1, 1024), f"{TOKEN}, batch 1": (1, 1), f"{TOKEN}, batch 8": (8, 1)}
QUICK_STEPS = 64

COMMON = {
    "vocab_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 64, "mamba_chunk_size": 256}
NEMOTRON = {"mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 1, "ssm_state_size": 64, "chunk_size": 256}
ZAMBA = {"n_mamba_heads": 8, "mamba_headdim": 64, "mamba_ngroups": 1, "mamba_d_state": 64, "chunk_size": 256}
DELTA = {
    **ATTENTION,
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
DELTA_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": (
        "Mamba2",
        {"num_hidden_layers": 4, "num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1, "chunk_size": 256},
    ),
    "bamba": ("Bamba", {**ATTENTION, **MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1", {**ATTENTION, **MAMBA, "mamba_d_ssm": 512}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {**ATTENTION, **MAMBA, **EXPERTS, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 256},
    ),
    "nemotron_h": (
        "NemotronH",
        {**ATTENTION, **NEMOTRON, "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mamba"]},
    ),
    "zamba2": (
        "Zamba2",
        {**ATTENTION, **ZAMBA, "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1},
    ),
    "qwen3_next": ("Qwen3Next", {**DELTA, **DELTA_EXPERTS}),
    "qwen3_5": ("Qwen3_5Text", DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeText", {**DELTA, **DELTA_EXPERTS}),
    "olmo_hybrid": ("OlmoHybrid", DELTA),
    "minimax": (
        "MiniMax",
        {**ATTENTION, **EXPERTS, "head_dim": 64, "layer_types": ["full_attention", "linear_attention"]},
    ),
    "gpt_oss": (
        "GptOss",
        {
            **ATTENTION,
            **EXPERTS,
            "head_dim": 64,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attn_implementation": "eager",
        },
    ),
}


def label(name: str) -> str:
    """What `--only` matches."""
    return f"model {name}"


def build(name: str, device: torch.device) -> nn.Module:
    """One model with random weights."""
    transformers = importlib.import_module("transformers")
    prefix, settings = MODELS[name]
    modeling(name)
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **settings})
    model: nn.Module = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")(config).to(device)
    return model


@dataclass
class Switch:
    """A model on one implementation or the other; setting what is set already costs nothing."""

    model: nn.Module
    now: str = THEIRS

    def set(self, who: str) -> None:
        """Put the model on this implementation."""
        if who == self.now:
            return
        if who == OURS:
            integration.patch(self.model)
        else:
            integration.disable()
        self.now = who


def compare(name: str, settings: Settings, quick: bool) -> Iterator[Row]:
    """Time each pass of a model on both implementations; a row says how many times faster it is on ours."""
    switch = Switch(build(name, settings.device))
    try:
        for pass_, (batch, full) in PASSES.items():
            steps = min(full, QUICK_STEPS) if quick else full
            tokens = torch.randint(1, 256, (batch, steps), device=settings.device)
            calls = [_implementation(switch, who, pass_, tokens, quick) for who in (THEIRS, OURS)]
            measure(calls, settings.device, settings.seconds)
            theirs, ours = calls
            yield {
                "model": name,
                "pass": pass_,
                "sizes": {"B": batch, "T": steps},
                "theirs_ms": theirs.median * 1e3,
                "ours_ms": ours.median * 1e3,
                "times_faster": theirs.times_slower_than(ours),
                "spread": ours.dispersion,
            }
    finally:
        switch.set(THEIRS)


def _implementation(switch: Switch, who: str, pass_: str, tokens: torch.Tensor, quick: bool) -> Implementation:
    """One pass on one implementation. It is switched in the call that is not timed, the first of a sample."""
    switch.set(who)
    call: Callable[[], Any]
    if pass_ == TRAINING:
        call = partial(_train, switch.model, tokens)
    elif pass_ == FORWARD:
        call = torch.no_grad()(partial(switch.model, tokens, use_cache=False))
    else:
        steps = QUICK_STEPS if quick else PROMPT
        prompt = torch.randint(1, 256, (tokens.shape[0], steps), device=tokens.device)
        with torch.no_grad():
            outputs = switch.model(prompt, use_cache=True)
        cache = {name: outputs[name] for name in ("past_key_values", "cache_params") if name in outputs}
        call = torch.no_grad()(partial(switch.model, tokens, use_cache=True, **cache))

    def timed(_: int) -> None:
        switch.set(who)
        call()

    return Implementation(who, timed)


def _train(model: nn.Module, tokens: torch.Tensor) -> None:
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    model.zero_grad()
