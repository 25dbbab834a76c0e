"""`python -m fla_ops list`: what is registered."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import fla_ops
from fla_ops.signature import Gradient

from . import Report


@dataclass(frozen=True)
class Entry:
    """One operator.

    kind        forward, backward, step (of decoding: without a gradient), or composite (calls other operators)
    inlines_on  device types on which `fla_ops.inlining()` puts a body in its place; None for a composite, whose parts
                have their own entries
    """

    name: str
    kind: str
    inlines_on: tuple[str, ...] | None
    schema: str

    def __str__(self) -> str:
        if self.inlines_on is None:
            inlines = "composes other operators"
        else:
            inlines = f"inlines on {', '.join(self.inlines_on)}" if self.inlines_on else "stays a call"
        return f"{self.name}: {self.kind}, {inlines}\n  {self.schema}"


def kind(operator: fla_ops.Operator) -> str:
    """What an operator is for."""
    if operator.kind == "composite":
        return "composite"
    if isinstance(operator.declaration, Gradient):
        return "backward"
    return "forward" if operator.kind == "differentiable" else "step"


def report() -> Report:
    """Every operator, in alphabetical order."""
    entries = [
        Entry(name, kind(x), None if x.kind == "composite" else x.inlines_on, x.schema)
        for name, x in sorted(fla_ops.ops().items())
    ]
    return Report([asdict(x) for x in entries], "\n".join(map(str, entries)))
