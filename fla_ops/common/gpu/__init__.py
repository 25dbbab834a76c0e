"""The Triton kernels and routines that two families or more use."""
