"""Shapes and dtypes of the normalisation of linear_attn."""

from __future__ import annotations

from torch import Tensor

from fla_ops.linear_attn import checks
from fla_ops.linear_attn.call import Normalize, Normalized, NormalizeStep
from fla_ops.validation import state_dtype


def normalize(c: Normalize) -> Normalized:
    sizes = checks.inputs(c)
    o = c.o.new_empty(sizes.of(c.axes["normalized"]))
    if not c.output_final_z:
        return Normalized(o, None)
    return Normalized(o, c.o.new_empty(sizes.of(c.axes["final_z"]), dtype=state_dtype(c.o)))


def normalize_step(c: NormalizeStep) -> Tensor:
    return c.o.new_empty(checks.step(c).of(c.axes["normalized"]))
