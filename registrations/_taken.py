"""Names in `torch.ops.fla` that another library registered before. flash-linear-attention registers there too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch

TAKEN: list[str] = []  # these operators of ours do not exist in this process


def is_free(namespace: str, name: str) -> bool:
    """Whether an operator can be registered by this name; a name that cannot is kept in TAKEN."""
    free = not hasattr(getattr(torch.ops, namespace), name)
    if not free:
        TAKEN.append(f"{namespace}::{name}")
    return free


def refuse_calls(public: dict[str, Any], names: list[str]) -> None:
    """Where a name was taken, warn, and let the public functions of these names raise: they would call, or call
    functions that call, an operator of somebody else.
    """
    if not TAKEN:
        return
    message = (
        f"another library registered {', '.join(TAKEN)} before fla_ops was imported, most likely a release of "
        "flash-linear-attention: fla_ops' functions raise in this process. Use releases that fit each other"
    )
    warnings.warn(message, RuntimeWarning, stacklevel=3)
    for name in names:
        if public[name].__module__.endswith(".api"):
            public[name] = _refusing(name, message)


def _refusing(name: str, message: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"fla_ops.{name} cannot run: {message}")

    return refuse
