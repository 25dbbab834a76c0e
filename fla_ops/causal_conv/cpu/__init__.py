"""The CPU implementations of causal_conv."""
