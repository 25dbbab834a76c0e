"""Fake implementations: what every operator returns, as shapes and dtypes, and what it refuses."""

from . import attn, causal_conv, gated_delta_rule, gsa, linear_attn, simple_gla

__all__ = ["attn", "causal_conv", "gated_delta_rule", "gsa", "linear_attn", "simple_gla"]
