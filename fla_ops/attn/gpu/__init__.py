"""The Triton kernels and their launchers of attn."""
