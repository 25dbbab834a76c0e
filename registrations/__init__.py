"""Schemas, gradients and the wiring of every operator; importing this package registers them."""

from . import simple_gla

__all__ = ["simple_gla"]
