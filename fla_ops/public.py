"""What every public function does: arguments that are no tensors, and defaults that None stands for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import Tensor

CHUNK_SIZE = 64
P = ParamSpec("P")
R = TypeVar("R")


def public(function: Callable[P, R]) -> Callable[P, R]:
    """A list or an array where a tensor belongs is a TypeError that names the argument and does not print its data."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, TypeError, AttributeError):
            refuse_what_is_no_tensor(function, args, kwargs)
            raise

    return run


def refuse_what_is_no_tensor(
    function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    """Raise TypeError for the first argument that should be a tensor, by its annotation, and is not."""
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return  # the message about missing or unknown arguments is Python's
    for name, value in bound.arguments.items():
        annotation = str(signature.parameters[name].annotation)
        missing = value is None and "None" in annotation
        if annotation.startswith("Tensor") and not missing and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}") from None


def steps_or_default(chunk_size: int | None) -> int:
    """Steps in a chunk; None means the default."""
    return CHUNK_SIZE if chunk_size is None else chunk_size
