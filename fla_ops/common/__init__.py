"""Kernels and ATen routines that two families or more use."""
