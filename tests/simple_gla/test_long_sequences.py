"""Errors that grow with the length: decays near one, met at every step, and gate gradients, gathered along the steps.

A factor exp(g) rounded to float32 is off by up to 2^-25, where g is constant in the same direction at every step: after
T steps the state is off by up to T 2^-25. A reference that multiplies by the rounded factor shares the error. The one
here sums logarithms in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fla_ops
from fla_ops.common.cpu import build
from tests import numerics
from tests.cases import Draw
from tests.contract.helpers import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="hours in Triton's interpreter")

CHUNK = 64
FORMS = ("chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla")
Named = dict[str, Tensor | None]


def naive(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The chunk form of one sequence [1, T, H, D], T a multiple of CHUNK, in the dtype of q; g [1, T, H] in float64."""
    queries, keys, values = (x[0].unflatten(0, (-1, CHUNK)).transpose(1, 2) for x in (q, k, v))  # [chunks, H, CHUNK, D]
    sums = g[0].unflatten(0, (-1, CHUNK)).mT.cumsum(-1)  # [chunks, H, CHUNK]
    above = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    within = (sums[..., :, None] - sums[..., None, :]).masked_fill(above, float("-inf")).exp().to(q.dtype)
    from_start, to_end = sums.exp().to(q.dtype), (sums[..., -1:] - sums).exp().to(q.dtype)
    added = (keys * to_end[..., None]).mT @ values
    total = sums[..., -1:, None].exp()
    high = total.to(q.dtype)  # in two parts: a product in float64 that is rounded once
    low = (total - high).to(q.dtype)
    state, states = torch.zeros_like(added[0]), []
    for i, j, x in zip(*(x.unbind() for x in (high, low, added)), strict=True):
        states.append(state)
        state = state * i + (state * j + x)
    read = (queries * from_start[..., None]) @ torch.stack(states)
    o = q.shape[3] ** -0.5 * ((queries @ keys.mT * within) @ values + read)
    return o.transpose(1, 2).flatten(0, 1)[None], state[None]


def draw(time: int, heads: int, width: int) -> dict[str, Tensor]:
    """q, k and v in float32."""
    normal = Draw(torch.float32, "cpu", 0).normal
    return {
        name: normal(name, (1, time, heads, width), std=width**-0.5 if name == "k" else 1.0) for name in ("q", "k", "v")
    }


def with_gradients(function: Callable[..., Any], arguments: dict[str, Tensor], of_state: bool = True) -> Named:
    """Outputs and the gradients of all arguments, for fixed gradients of the outputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
    outputs = dict(zip(("o", "final_state"), function(**leaves), strict=True))
    if not of_state:
        del outputs["final_state"]
    arriving = [Draw(y.dtype, "cpu", 1).normal(name, y.shape) for name, y in outputs.items()]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), arriving)
    return outputs | {f"d{name}": x for name, x in zip(leaves, found, strict=True)}


def check(
    form: Callable[..., Any],
    arguments: dict[str, Tensor],
    gate: Callable[[Tensor | None], Tensor] | None = None,
    gradients: bool = True,
    reverse: bool = False,
) -> None:
    """A form against the naive chunk form, in float32 and in float64; `gate` makes its g from the last argument."""
    *_, last = arguments

    def reference(dtype: torch.dtype) -> Callable[..., Any]:
        def function(**x: Tensor) -> tuple[Tensor, Tensor]:
            g = x[last].double() if gate is None else gate(x[last].double())
            steps = [y.to(dtype) for y in (x["q"], x["k"], x["v"])]
            if not reverse:
                return naive(*steps, g)
            o, state = naive(*(y.flip(1) for y in steps), g.flip(1))
            return o.flip(1), state

        return function

    def function(**x: Tensor) -> tuple[Tensor, Tensor]:
        given: Any = {"reverse": True} if reverse else {}
        return form(**x, **given, output_final_state=True)

    def run(function: Callable[..., Any], arguments: dict[str, Tensor]) -> Named:
        if gradients:
            return with_gradients(function, arguments)
        with torch.no_grad():
            return dict(zip(("o", "final_state"), function(**arguments), strict=True))

    wide = {name: x.double() for name, x in arguments.items()}
    found, best = run(function, arguments), run(reference(torch.float32), arguments)
    numerics.check(found, best, run(reference(torch.float64), wide), torch.float32)


def constant(time: int) -> Callable[[Tensor], Tensor]:
    """From g_gamma [H] to g [1, T, H]."""
    return lambda gamma: gamma.expand(1, time, -1)


@pytest.mark.parametrize("decay", [-1e-5, -4e-8, 1e-6], ids=["slow", "below-the-spacing-of-floats", "growth"])
@pytest.mark.parametrize("per_step", [True, False], ids=["per-step", "constant"])
@pytest.mark.parametrize("form", FORMS)
def test_decays_near_one(form: str, per_step: bool, decay: float) -> None:
    time, heads = 1 << 16, 1
    arguments = draw(time, heads, 16)
    if per_step:
        check(getattr(fla_ops, form), arguments | {"g": torch.full((1, time, heads), decay)})
    else:
        check(getattr(fla_ops, form), arguments | {"g_gamma": torch.full((heads,), decay)}, constant(time))


@pytest.mark.parametrize("form", FORMS[:2])
def test_decays_near_one_without_kernels(form: str) -> None:
    time = 1 << 16
    with mock.patch.object(build, "library", return_value=None):
        check(getattr(fla_ops, form), draw(time, 1, 16) | {"g_gamma": torch.tensor([-1e-5])}, constant(time))


@pytest.mark.parametrize("decay", [-3.0, -8.0, -0.1], ids=str)
@pytest.mark.parametrize("form", [*FORMS, "fused_recurrent-in-reverse"])
def test_gradients_of_gates(form: str, decay: float) -> None:
    """They are exp(g) times smaller than the terms q . dq and k . dk, whose difference they are the sum of."""
    name, reverse = (FORMS[2], True) if form.endswith("reverse") else (form, False)
    arguments = draw(4096, 2, 16)
    check(getattr(fla_ops, name), arguments | {"g": torch.full((1, 4096, 2), decay)}, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "in-reverse"])
def test_gradients_of_gates_without_kernels(reverse: bool) -> None:
    with mock.patch.object(build, "library", return_value=None):
        arguments = draw(1024, 2, 16) | {"g": torch.full((1, 1024, 2), -3.0)}
        check(fla_ops.fused_recurrent_simple_gla, arguments, reverse=reverse)


@pytest.mark.parametrize("form", ["chunk", "fused_chunk", "fused_recurrent"])
def test_alibi_slopes_of_a_late_layer(form: str) -> None:
    time, layer = 1 << 16, {"layer_idx": 79, "num_layers": 80}
    slopes = fla_ops.lightning_decay(2, **layer, slopes="alibi")

    def function(**given: Any) -> tuple[Tensor, Tensor]:
        return getattr(fla_ops, f"{form}_lightning_attn")(**given, **layer, slopes="alibi")

    check(function, draw(time, 2, 16), lambda _: slopes.double().expand(1, time, -1))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS[:2])
def test_a_million_steps(form: str) -> None:
    time = 1 << 20
    arguments = draw(time, 1, 16) | {"g_gamma": torch.tensor([-4e-8])}
    check(getattr(fla_ops, form), arguments, constant(time), gradients=False)
