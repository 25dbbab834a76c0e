"""A sum over steps that float16 cannot hold: the state is carried in float32, so what is read from it may still fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fla_ops
from fla_ops.simple_gla import reference
from tests import numerics
from tests.contract.helpers import INTERPRETED

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before Triton is imported"),
]

TIME, WIDTH, SIZE = 300, 3, 17.0


@pytest.mark.parametrize("form", [fla_ops.chunk_simple_gla, fla_ops.fused_chunk_simple_gla], ids=lambda f: f.__name__)
def test_a_state_beyond_float16(form: Any) -> None:
    torch.manual_seed(0)
    q, do = (0.05 * torch.randn(1, TIME, 1, WIDTH) for _ in range(2))
    k, v = (SIZE * (1 + 0.1 * torch.rand(1, TIME, 1, WIDTH)) for _ in range(2))
    given = [x.half().requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in given]

    def evaluate(function: Any, inputs: list[Tensor]) -> dict[str, Tensor]:
        o = function(*inputs)[0]
        return dict(
            zip(("o", "dq", "dk", "dv"), (o, *torch.autograd.grad(o, inputs, do.half().to(o.dtype))), strict=True)
        )

    assert reference.recurrent(*wide)[1].abs().max() > torch.finfo(torch.float16).max
    results = evaluate(form, given)
    numerics.check(results, evaluate(reference.recurrent, given), evaluate(reference.recurrent, wide), torch.float16)
