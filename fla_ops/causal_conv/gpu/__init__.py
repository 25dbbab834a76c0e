"""The Triton kernels and their launchers of causal_conv."""
