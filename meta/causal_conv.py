"""Shapes and dtypes of the causal_conv operators."""

from __future__ import annotations

from torch import Tensor

from fla_ops.causal_conv import checks
from fla_ops.causal_conv.call import Call, Outputs, Step
from fla_ops.validation import state_dtype


def forward(c: Call) -> Outputs:
    sizes = checks.inputs(c)
    o = c.x.new_empty(sizes.of(c.axes["o"]))
    if not c.output_final_state:
        return Outputs(o, None)
    return Outputs(o, c.x.new_empty(sizes.of(c.axes["final_state"]), dtype=state_dtype(c.x)))


def step(c: Step) -> Tensor:
    return c.x.new_empty(checks.step(c).of(c.axes["o"]))
