"""The CPU implementations of attn."""
