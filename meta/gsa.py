"""Shapes and dtypes of the gsa operators."""

from __future__ import annotations

from torch import Tensor

from fla_ops.gsa import checks
from fla_ops.gsa.call import Call, Kept, Outputs, Prefill, Record, Recorded, Step
from fla_ops.validation import Sizes, state_dtype


def _states(c: Call, sizes: Sizes, wanted: bool, *names: str) -> tuple[Tensor | None, ...]:
    """States and the argument of the softmax are carried in float32, or in float64 for float64 activations."""
    return tuple(c.v.new_empty(sizes.of(c.axes[x]), dtype=state_dtype(c.v)) if wanted else None for x in names)


def chunk_forward(c: Call) -> Kept:
    sizes = checks.inputs(c)
    sizes["C"] = c.chunks
    return Kept(
        c.v.new_empty(sizes.of(c.axes["o"])),
        *_states(c, sizes, c.output_final_state, "final_k", "final_v"),
        *_states(c, sizes, c.checkpoint_level < 2, "earlier", "own"),
        *_states(c, sizes, c.checkpoint_level < 1, "states_k", "states_v"),
    )


def recurrent_forward(c: Call) -> Outputs:
    sizes = checks.inputs(c)
    final = _states(c, sizes, c.output_final_state, "final_k", "final_v")
    return Outputs(c.v.new_empty(sizes.of(c.axes["o"])), *final)


def record(c: Record) -> Recorded:
    sizes, names = checks.record(c), ("states_k", "states_v", "final_k", "final_v")
    if c.at is None:
        sizes["C"] = c.rows
    o = None if c.q is None else c.v.new_empty(sizes.of(c.axes["o"]))
    return Recorded(o, *(c.v.new_empty(sizes.of(c.axes[name]), dtype=state_dtype(c.v)) for name in names))


advance = checks.advance


def prefill(c: Prefill) -> Tensor:
    return c.v.new_empty(checks.prefill(c).of(c.axes["o"]))


def step(c: Step) -> Tensor:
    return c.v.new_empty(checks.step(c).of(c.axes["o"]))
