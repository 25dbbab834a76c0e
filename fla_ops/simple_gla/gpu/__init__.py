"""The Triton kernels and their launchers of simple_gla."""
