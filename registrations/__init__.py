"""Schemas, gradients and the wiring of every operator; importing this package registers them."""

from . import _digest, simple_gla

_digest.tag_compile_caches()

__all__ = ["simple_gla"]
