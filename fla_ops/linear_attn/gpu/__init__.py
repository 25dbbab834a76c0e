"""The Triton kernels and their launchers of linear_attn."""
