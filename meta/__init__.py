"""Fake implementations: what every operator returns, as shapes and dtypes, and what it refuses."""

from . import simple_gla

__all__ = ["simple_gla"]
