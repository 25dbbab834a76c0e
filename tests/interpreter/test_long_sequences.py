"""Errors that grow with the length in a GPU's kernels: decays near one, gate gradients gathered along the steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import fla_ops
from fla_ops.common.gpu.decay import factor
from fla_ops.gated_delta_rule import reference as gated_delta_rule
from fla_ops.simple_gla import reference
from fla_ops.simple_gla.call import Call, Need, Outputs
from fla_ops.simple_gla.gpu import fused_recurrent
from tests import numerics
from tests.contract.helpers import INTERPRETED

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before Triton is imported"),
]


@triton.jit
def factor_kernel(x, rounded, rest, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    high, low = factor(tl.load(x + at))
    tl.store(rounded + at, high)
    tl.store(rest + at, low)


def test_a_factor_near_one_is_exact_in_two_parts() -> None:
    x = torch.linspace(-0.24, 0.24, 1024)
    x[:512] *= 1e-6
    rounded, rest = torch.empty_like(x), torch.empty_like(x)
    factor_kernel[(1,)](x, rounded, rest, 1024)
    truth = x.double().exp2()
    precise = 2 * torch.finfo(torch.float32).eps * (truth - 1).abs() + torch.finfo(torch.float64).eps
    assert ((rounded.double() + rest.double() - truth).abs() <= precise).all()
    assert not ((rounded.double() - truth).abs() <= precise).all()


def test_other_factors_are_their_rounding() -> None:
    x = torch.tensor([float("-inf"), -1e4, -3.0, -0.25, 0.25, 2.0, float("inf"), float("nan")])
    rounded, rest = torch.empty_like(x), torch.empty_like(x)
    factor_kernel[(1,)](x, rounded, rest, 8)
    assert torch.equal(rounded.nan_to_num(nan=7.0), x.exp2().nan_to_num(nan=7.0))
    assert not rest.any()


@pytest.mark.parametrize("decay", ["g", "g_gamma"])
def test_the_recurrence_has_no_bias(decay: str) -> None:
    """exp(g) is nearer to one than to any other float32."""
    time = 2048
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, time, 1, 2) for _ in range(3))
    gates = torch.full((1, time, 1) if decay == "g" else (1,), -2.9e-8)
    g, g_gamma = (gates, None) if decay == "g" else (None, gates)
    o, final = fused_recurrent.forward(Call(q, k, v, g, g_gamma, output_final_state=True))
    wide = [x.double() for x in (q, k, v)]
    truth, state = reference.recurrent(*wide, *(None if x is None else x.double() for x in (g, g_gamma)))
    assert numerics.error(o, truth) <= numerics.FLOOR[torch.float32]
    assert numerics.error(final, state) <= numerics.FLOOR[torch.float32]


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "in-reverse"])
def test_gradients_of_strong_gates(reverse: bool) -> None:
    """They are exp(g) times smaller than the terms q . dq and k . dk, whose difference they are the sum of."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, 150, 2, 4) for _ in range(4))
    g, state, dfinal = torch.full((1, 150, 2), -8.0), torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    wide = [x.double().requires_grad_() for x in (q, k, v, g)]
    outputs = reference.recurrent(*wide, initial_state=state.double(), reverse=reverse)
    truth = torch.autograd.grad(outputs, wide, (do.double(), dfinal.double()))
    c = Call(q, k, v, g, initial_state=state, reverse=reverse)
    found = fused_recurrent.backward(c, Outputs(do, dfinal), Need(True, True, True, True, False, False))
    for result, expected in zip(found, truth, strict=False):
        assert numerics.error(result, expected) <= numerics.FLOOR[torch.float32]


def test_gate_gradients_of_the_delta_rule_beside_bfloat16() -> None:
    """What later steps read and what earlier ones wrote nearly cancel over a few chunks."""
    torch.manual_seed(0)
    activations = [torch.randn(1, 256, 1, 64).bfloat16() for _ in range(3)]
    gates = [-0.1 * torch.rand(1, 256, 1), torch.rand(1, 256, 1)]
    arriving = torch.randn(1, 256, 1, 64).bfloat16(), torch.randn(1, 1, 64, 64)
    state = torch.randn(1, 1, 64, 64)

    def gradient(dtype: torch.dtype | None, function: Callable[..., tuple[Tensor, Tensor | None]]) -> Tensor:
        q, k, v, g, beta, initial = (x.to(dtype or x.dtype) for x in (*activations, *gates, state))
        outputs = function(q, k, v, g.requires_grad_(), beta, initial_state=initial, use_qk_l2norm_in_kernel=True)
        return torch.autograd.grad(outputs, g, [d.to(o.dtype) for d, o in zip(arriving, outputs, strict=True)])[0]

    found = gradient(None, partial(fla_ops.chunk_gated_delta_rule, output_final_state=True))
    reference, truth = (gradient(dtype, gated_delta_rule.recurrent) for dtype in (None, torch.float64))
    numerics.check({"g": found}, {"g": reference}, {"g": truth}, torch.bfloat16)
