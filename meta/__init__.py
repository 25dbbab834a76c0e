"""Fake implementations: what every operator returns, as shapes and dtypes, and what it refuses."""

from . import attn, gated_delta_rule, gsa, linear_attn, simple_gla

__all__ = ["attn", "gated_delta_rule", "gsa", "linear_attn", "simple_gla"]
