"""The CPU implementations of gsa."""
