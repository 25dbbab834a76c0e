"""The CPU implementations of linear_attn."""
