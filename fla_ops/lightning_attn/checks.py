"""What lightning_attn accepts beyond what simple_gla's operators check."""

from __future__ import annotations

from typing import Any

import torch

SLOPES = ("linear", "alibi")


def decay(num_heads: Any, layer_idx: Any, num_layers: Any, slopes: str) -> None:
    """A layer of the model and a rule that exists; the numbers may be symbolic, and plain ones are compared first."""
    plain = type(num_heads) is type(layer_idx) is type(num_layers) is int
    if plain and num_heads >= 1 and 0 <= layer_idx < num_layers and slopes in SLOPES:
        return
    torch._check_value(num_heads >= 1, lambda: f"num_heads must be at least 1, got {num_heads}")
    torch._check_value(num_layers >= 1, lambda: f"num_layers must be at least 1, got {num_layers}")
    torch._check_value(
        layer_idx >= 0, lambda: f"layer_idx must be in [0, num_layers) = [0, {num_layers}), got {layer_idx}"
    )
    torch._check_value(
        layer_idx < num_layers, lambda: f"layer_idx must be in [0, num_layers) = [0, {num_layers}), got {layer_idx}"
    )
    torch._check_value(slopes in SLOPES, lambda: f"slopes must be one of {', '.join(SLOPES)}, got {slopes!r}")
