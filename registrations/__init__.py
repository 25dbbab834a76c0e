"""Schemas, gradients and the wiring of every operator; importing this package registers them."""

from . import _digest, attn, causal_conv, gated_delta_rule, gsa, lightning_attn, linear_attn, simple_gla, ssd

_digest.tag_compile_caches()

__all__ = ["attn", "causal_conv", "gated_delta_rule", "gsa", "lightning_attn", "linear_attn", "simple_gla", "ssd"]
