"""The outputs to fill, and those of a window of no keys, which need no kernel."""

from __future__ import annotations

import torch

from fla_ops.validation import state_dtype

from .call import Call, Gradients, Need, Outputs, Prefill, PrefillNeed


def empty(c: Call | Prefill) -> Outputs:
    """Outputs to fill."""
    o, wide = c.q.new_empty((*c.q.shape[:3], c.v.shape[3])), state_dtype(c.q)
    rest = torch.empty_like(o) if c.output_rest and o.dtype is not wide else None
    return Outputs(o, o.new_empty(o.shape[:3], dtype=wide), rest)


def without_keys(c: Call | Prefill) -> Outputs:
    """What rows give that see no key: nothing, and of the denominator the sink."""
    o, lse, rest = empty(c)
    if rest is not None:
        rest.zero_()
    return Outputs(o.zero_(), lse.copy_(c.sink_bias) if c.sink_bias is not None else lse.fill_(-torch.inf), rest)


def gradients_without_keys(c: Call | Prefill, d: Outputs, need: Need | PrefillNeed) -> Gradients:
    """The gradients of `without_keys`: only the logarithms of the denominators pass one on, to the sinks."""
    inputs = (getattr(c, name) for name in need._fields)
    found = [x.new_zeros(x.shape) if wanted else None for wanted, x in zip(need, inputs, strict=True)]
    dsink_bias = found[need._fields.index("sink_bias")]
    if dsink_bias is not None and d.lse is not None:
        dsink_bias.copy_(d.lse.sum((0, 1), dtype=torch.float64))
    return tuple(found)
