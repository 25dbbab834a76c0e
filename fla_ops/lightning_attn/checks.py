"""What lightning_attn accepts beyond what simple_gla's operators check."""

from __future__ import annotations

import torch

from fla_ops import validation as valid

from .call import Call, Decay

SLOPES = ("linear", "alibi")


def call(c: Call) -> None:
    """Raise ValueError or TypeError unless the arguments describe one call of a form; sizes may be symbolic."""
    sizes = valid.axes(c, grouped=("v", "H", "q and k", "HK"))
    valid.same_dtype(q=c.q, k=c.k, v=c.v)
    valid.floating(initial_state=c.initial_state)
    valid.same_device(c)
    valid.chunk_size(c.chunk_size)
    decay(Decay(sizes["H"], c.layer_idx, c.num_layers, c.slopes))


def decay(c: Decay) -> None:
    """A layer of the model and a rule that exists; the numbers may be symbolic, and plain ones are compared first."""
    plain = type(c.num_heads) is type(c.layer_idx) is type(c.num_layers) is int
    if plain and c.num_heads >= 1 and 0 <= c.layer_idx < c.num_layers and c.slopes in SLOPES:
        return
    torch._check_value(c.num_heads >= 1, lambda: f"num_heads must be at least 1, got {c.num_heads}")
    torch._check_value(c.num_layers >= 1, lambda: f"num_layers must be at least 1, got {c.num_layers}")
    for inside in (c.layer_idx >= 0, c.layer_idx < c.num_layers):
        torch._check_value(
            inside, lambda: f"layer_idx must be in [0, num_layers) = [0, {c.num_layers}), got {c.layer_idx}"
        )
    torch._check_value(c.slopes in SLOPES, lambda: f"slopes must be one of {', '.join(SLOPES)}, got {c.slopes!r}")
