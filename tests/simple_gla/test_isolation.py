"""How far a NaN or an infinity goes: forwards in time, not back, and not into another sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

import fla_ops
from fla_ops.common.cpu import build
from tests.cases import Draw
from tests.contract.helpers import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter serves the CPU")

FORMS = ("chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla", "parallel_simple_gla")
SERVED = [
    pytest.param(torch.float32, True, id="compiled"),
    pytest.param(torch.float32, False, id="float32-without-kernels"),
    pytest.param(torch.float64, True, id="float64"),
]


@pytest.fixture
def kernels(compiles: bool) -> Iterator[None]:
    """The C++ kernels, or as where they do not compile."""
    if compiles:
        yield
        return
    with mock.patch.object(build, "library", return_value=None):
        yield


def draw(dtype: torch.dtype, batch: int, time: int, heads: int, width: int) -> dict[str, Tensor]:
    """q, k and v."""
    return {name: Draw(dtype, "cpu", 0).normal(name, (batch, time, heads, width)) for name in ("q", "k", "v")}


def attn(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Softmax attention with decay; the gates of a head are those of the first width."""
    return fla_ops.parallel_attn(q, k, v, g[..., 0])


def gsa(q: Tensor, k: Tensor, v: Tensor, g: Tensor, form: str = "chunk_gsa") -> Tensor:
    """Slot attention, with as many slots as widths."""
    return getattr(fla_ops, form)(q, k, v, k + v, g)[0]


def simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, form: str = "") -> Tensor:
    """A form of simple_gla."""
    return getattr(fla_ops, form)(q, k, v, g[..., 0])[0]


OPERATORS = {
    **{form: partial(simple_gla, form=form) for form in FORMS},
    **{form: partial(gsa, form=form) for form in ("chunk_gsa", "fused_recurrent_gsa")},
    "parallel_attn": attn,
}
EXACT = [
    pytest.param(operator, *served.values, id=f"{name}-{served.id}")
    for name, operator in OPERATORS.items()
    for served in SERVED
]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize(("operator", "dtype", "compiles"), EXACT)
@pytest.mark.usefixtures("kernels")
def test_a_gate_does_not_reach_earlier_steps(
    operator: Callable[..., Tensor], number: float, dtype: torch.dtype
) -> None:
    inputs = draw(dtype, 2, 150, 2, 20)
    g = Draw(dtype, "cpu", 0).decay("g", (2, 150, 2, 20))
    expected = operator(**inputs, g=g)
    for step in (5, 64, 70, 127):
        changed = g.clone()
        changed[:, step] = number
        o = operator(**inputs, g=changed)
        assert torch.equal(o[:, :step], expected[:, :step]), f"step {step} reaches back"


@pytest.mark.parametrize(("dtype", "compiles"), SERVED)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("kernels")
def test_a_gate_that_is_nan_has_a_gradient_that_is_nan(form: str, dtype: torch.dtype) -> None:
    inputs = draw(dtype, 2, 70, 3, 20)
    for name, shape in (("g_gamma", (3,)), ("g", (2, 70, 3))):
        gate = Draw(dtype, "cpu", 0).decay(name, shape)
        gate[..., 1] = float("nan")
        gate.requires_grad_()
        getattr(fla_ops, form)(**inputs, **{name: gate})[0].sum().backward()
        assert gate.grad[..., 1].isnan().all()
        assert not gate.grad[..., ::2].isnan().any()


@pytest.mark.parametrize(("dtype", "compiles"), SERVED)
@pytest.mark.parametrize("width", [1, 17, 100])
@pytest.mark.parametrize("form", [*FORMS, "chunk_linear_attn", "fused_recurrent_linear_attn"])
@pytest.mark.usefixtures("kernels")
def test_widths_past_a_multiple_of_sixteen(form: str, width: int, dtype: torch.dtype) -> None:
    inputs = draw(dtype, 4, 70, 2, width)
    gate = {} if "linear" in form else {"g": Draw(dtype, "cpu", 0).decay("g", (4, 70, 2))}
    found = []
    for number in (float("nan"), 1.0):
        leaves = {name: x.clone() for name, x in (inputs | gate).items()}
        for x in leaves.values():
            x[0] = number
            x.requires_grad_()
        o = getattr(fla_ops, form)(**leaves)[0]
        found.append([o, *torch.autograd.grad(o.square().sum(), list(leaves.values()))])
    for poisoned, clean in zip(*found, strict=True):
        assert torch.equal(poisoned[1:], clean[1:])
