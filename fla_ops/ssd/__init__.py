"""Mamba-2 between its projections, as a composition of simple_gla and what surrounds it."""
