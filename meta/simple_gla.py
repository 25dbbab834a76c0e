"""Shapes and dtypes of the simple_gla operators."""

from __future__ import annotations

from torch import Tensor

from fla_ops.simple_gla import checks
from fla_ops.simple_gla.call import Call, Outputs, Prefill, Record, Recorded, Step, Weighted
from fla_ops.validation import state_dtype


def forward(c: Call) -> Outputs:
    sizes = checks.inputs(c)
    o = c.v.new_empty(sizes.of(c.axes["o"]))
    if not c.output_final_state:
        return Outputs(o, None)
    return Outputs(o, c.v.new_empty(sizes.of(c.axes["final_state"]), dtype=state_dtype(c.v)))


def parallel_forward(c: Call) -> Weighted:
    sizes = checks.inputs(c)
    attn = c.v.new_empty(sizes.of(c.axes["attn"])) if c.output_attentions else None
    return Weighted(c.v.new_empty(sizes.of(c.axes["o"])), attn)


def step(c: Step) -> Tensor:
    return c.v.new_empty(checks.step(c).of(c.axes["o"]))


def record(c: Record) -> Recorded:
    sizes, dtype = checks.record(c), state_dtype(c.v)
    if c.at is None:
        sizes["C"] = c.rows
    o = None if c.q is None else c.v.new_empty(sizes.of(c.axes["o"]))
    return Recorded(o, *(c.v.new_empty(sizes.of(c.axes[name]), dtype=dtype) for name in ("states", "final_state")))


advance = checks.advance


def prefill(c: Prefill) -> Tensor:
    return c.v.new_empty(checks.prefill(c).of(c.axes["o"]))
