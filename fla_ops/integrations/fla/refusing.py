"""What is asked for and not computed is refused by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def refuse(function: str, **asked: Any) -> None:
    """Raise NotImplementedError if any of these arguments asks for something: None, False and zero do not."""
    found = [name for name, value in asked.items() if isinstance(value, Tensor) or value not in (None, False)]
    if found:
        raise NotImplementedError(f"fla_ops serves {function} without {', '.join(found)}: leave it out, or disable()")
