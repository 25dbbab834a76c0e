"""The Triton kernels of the gated delta rule, and their launchers."""
