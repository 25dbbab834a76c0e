"""The CPU implementations of simple_gla."""
