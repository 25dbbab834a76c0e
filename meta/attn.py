"""Shapes and dtypes of the attn operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.attn import checks
from fla_ops.attn.call import Call, Decoding, Outputs, Prefill
from fla_ops.validation import Sizes, state_dtype


def forward(c: Call) -> Outputs:
    return _outputs(c, checks.inputs(c))


def prefill(c: Prefill) -> Outputs:
    return _outputs(c, checks.prefill(c))


def _outputs(c: Call | Prefill, sizes: Sizes) -> Outputs:
    o = c.q.new_empty(sizes.of(c.axes["o"]))
    lse = c.q.new_empty(sizes.of(c.axes["lse"]), dtype=state_dtype(c.q))
    kept = c.output_rest and c.q.dtype in (torch.bfloat16, torch.float16)
    return Outputs(o, lse, c.q.new_empty(sizes.of(c.axes["rest"])) if kept else None)


def decoding(c: Decoding) -> Tensor:
    return c.q.new_empty(checks.decoding(c).of(c.axes["o"]))
