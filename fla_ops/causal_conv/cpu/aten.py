"""causal_conv as ATen calls, for float64, machines without a C++ compiler, and what `inlining()` compiles.

A sequence is laid out in rows, the W - 1 of its state and then its steps, so that o_t sees rows t ... t + W - 1. The
gradient of a row is what the outputs that see it pass on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from fla_ops.common.cpu import slots
from fla_ops.common.cpu.sequences import one_by_one
from fla_ops.validation import Size, cu_seqlens_values_async, state_dtype

from .. import checks
from ..call import Call, Gradients, Need, Outputs, Step


def forward(c: Call) -> Outputs:
    """o [B, T, D] in x's dtype, and the last W - 1 steps."""
    checks.eager(c)

    def body(c: Call) -> Outputs:
        layout = _layout(c)
        rows = layout.rows(c)
        o = _activated(_filtered(layout, rows, c), c.activation)
        return Outputs(layout.steps(o, c.x.dtype), layout.last(rows) if c.output_final_state else None)

    return Outputs(*one_by_one(body, c, Outputs._fields))


def backward(c: Call, d: Outputs, need: Need) -> Gradients:
    """The gradients that are needed; the sums before the activation are computed again."""
    return tuple(one_by_one(_gradients, c, Need._fields, d, need))


def step(c: Step) -> Tensor:
    """One step for N sequences: rows of the pool updated in place."""
    checks.eager_step(c)
    dtype, taps = state_dtype(c.x), c.weight.shape[1]
    held = slots.read(c.state, c.slots)
    rows = torch.cat([held.to(dtype), c.x.to(dtype).unsqueeze(-1)], -1)
    o = (rows[..., rows.shape[-1] - taps :] * c.weight.to(dtype)).sum(-1)
    o = o if c.bias is None else o + c.bias.to(dtype)
    slots.write_(c.state, c.slots, held, rows[..., 1:])
    return slots.only_with_slots(_activated(o, c.activation).to(c.x.dtype), c.slots)


class Dense:
    """A batch of sequences of one length: rows [B, W - 1 + T, D]."""

    def __init__(self, c: Call) -> None:
        self.time, self.before = c.x.shape[1], c.weight.shape[1] - 1

    def rows(self, c: Call) -> Tensor:
        dtype = state_dtype(c.x)
        state = c.x.new_zeros(c.state_shape) if c.initial_state is None else c.initial_state
        return torch.cat([state.to(dtype).mT, c.x.to(dtype)], 1)

    def steps(self, o: Tensor, dtype: torch.dtype) -> Tensor:
        """The outputs, of which the row that an output sees first has the place."""
        return o.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def places(self, d: Tensor) -> Tensor:
        """The inverse, with a zero at every other row."""
        return pad(d, (0, 0, 0, self.before))

    def own(self, rows: Tensor) -> Tensor:
        """Of all rows, those of the steps."""
        return rows[:, self.before :]

    def first(self, rows: Tensor) -> Tensor:
        """Those of the initial state, [N, D, W - 1]."""
        return rows[:, : self.before].mT

    def last(self, rows: Tensor) -> Tensor:
        """Those of the final state, [N, D, W - 1]."""
        return rows.narrow(1, self.time, self.before).mT.clone(memory_format=torch.contiguous_format)

    def with_last(self, rows: Tensor, d: Tensor) -> Tensor:
        """The rows with d [N, D, W - 1] added to those of the final state."""
        return rows + pad(d.mT.to(rows.dtype), (0, 0, self.time, 0))


class Packed:
    """Sequences laid end to end, each with its state before it: rows [1, N (W - 1) + T, D]. No value is read."""

    def __init__(self, c: Call) -> None:
        offsets, self.before, time = c.cu_seqlens, c.weight.shape[1] - 1, c.x.shape[1]
        cu_seqlens_values_async(offsets, time)
        step = torch.arange(time, device=offsets.device)
        self.sequences: Size = offsets.shape[0] - 1
        owner = torch.searchsorted(offsets[1:].contiguous(), step, right=True).clamp(max=self.sequences - 1)
        self.count: Size = time + self.sequences * self.before
        self.output = step + owner * self.before  # the row that a step's output sees first
        earlier = torch.arange(self.sequences, device=offsets.device) * self.before
        taps = torch.arange(self.before, device=offsets.device)
        self.at_first = ((offsets[:-1] + earlier)[:, None] + taps).flatten()
        self.at_last = ((offsets[1:] + earlier)[:, None] + taps).flatten()

    def rows(self, c: Call) -> Tensor:
        dtype = state_dtype(c.x)
        rows = c.x.new_zeros((self.count, c.x.shape[2]), dtype=dtype)
        rows = rows.index_copy(0, self.output + self.before, c.x[0].to(dtype))
        if c.initial_state is not None:
            rows = rows.index_copy(0, self.at_first, c.initial_state.to(dtype).mT.flatten(0, 1))
        return rows[None]

    def steps(self, o: Tensor, dtype: torch.dtype) -> Tensor:
        return o[:, self.output].to(dtype)

    def places(self, d: Tensor) -> Tensor:
        rows = d.new_zeros((self.count, d.shape[2]))
        return rows.index_copy(0, self.output, d[0])[None]

    def own(self, rows: Tensor) -> Tensor:
        return rows[:, self.output + self.before]

    def first(self, rows: Tensor) -> Tensor:
        return self._state(rows, self.at_first)

    def last(self, rows: Tensor) -> Tensor:
        return self._state(rows, self.at_last).contiguous()

    def with_last(self, rows: Tensor, d: Tensor) -> Tensor:
        return rows.index_add(1, self.at_last, d.to(rows.dtype).mT.flatten(0, 1)[None])

    def _state(self, rows: Tensor, at: Tensor) -> Tensor:
        return rows[0, at].unflatten(0, (self.sequences, self.before)).mT


def _layout(c: Call) -> Dense | Packed:
    return Dense(c) if c.cu_seqlens is None else Packed(c)


def _filtered(layout: Dense | Packed, rows: Tensor, c: Call) -> Tensor:
    """The sums before the activation, in the row that each sees first."""
    count, taps = rows.shape[1] - layout.before, c.weight.to(rows.dtype).unbind(1)
    o = rows[:, :count] * taps[0]
    for i, tap in enumerate(taps[1:], 1):
        o = o + rows[:, i : i + count] * tap
    return o if c.bias is None else o + c.bias.to(rows.dtype)


def _activated(o: Tensor, activation: str | None) -> Tensor:
    return o if activation is None else silu(o)


def _gradients(c: Call, d: Outputs, need: Need) -> Gradients:
    layout = _layout(c)
    rows = layout.rows(c)
    do = d.o.to(rows.dtype)
    if c.activation is not None:
        sums = layout.steps(_filtered(layout, rows, c), rows.dtype)
        share = sums.sigmoid()
        do = do * share * (1 + sums * (1 - share))
    do = layout.places(do)
    dx = dweight = dbias = dstate = None
    if need.x or need.initial_state:
        drows = _passed_on(do, c.weight.to(rows.dtype))
        drows = drows if d.final_state is None else layout.with_last(drows, d.final_state)
        if need.x:
            dx = layout.own(drows).to(c.x.dtype, copy=True, memory_format=torch.contiguous_format)
        if need.initial_state:
            dstate = layout.first(drows).to(c.initial_state.dtype, copy=True, memory_format=torch.contiguous_format)
    if need.weight:
        dweight = _seen(rows, do, c.weight.shape[1]).to(c.weight.dtype)
    if need.bias:
        dbias = do.sum((0, 1)).to(c.bias.dtype)
    return dx, dweight, dbias, dstate


def _passed_on(do: Tensor, weight: Tensor) -> Tensor:
    """sum_i weight_i do_{r - i} at each row r."""
    count, before = do.shape[1], weight.shape[1] - 1
    padded = pad(do, (0, 0, before, 0))
    return sum(padded[:, before - i : before - i + count] * weight[:, i] for i in range(before + 1))


def _seen(rows: Tensor, do: Tensor, taps: int) -> Tensor:
    """sum_r do_r x_{r + i} for each tap, [D, W]."""
    count = rows.shape[1] - taps + 1
    return torch.stack([(do[:, :count] * rows[:, i : i + count]).sum((0, 1)) for i in range(taps)], -1)
