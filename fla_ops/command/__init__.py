"""The subcommands of `python -m fla_ops`. Nothing else imports this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """What a subcommand found: data for --json, the same as text, and the exit status."""

    data: Any
    text: str
    status: int = 0
