"""The chunk kernels of a CPU with time backwards: what the forward walk makes of the steps in the other order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch import Tensor

from fla_ops.common.cpu import build as compiled
from fla_ops.simple_gla import reference
from fla_ops.simple_gla.cpu import cpp
from tests import numerics
from tests.cases import Draw, strided
from tests.contract.helpers import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter serves the CPU")

FORMS = {
    "chunk": (cpp.chunk_forward, cpp.chunk_backward),
    "fused_chunk": (cpp.fused_chunk_forward, cpp.fused_chunk_backward),
}
NAMES = ("q", "k", "v", "g", "g_gamma", "initial_state")
OFFSETS = (0, 0, 1, 130, 261)
Named = dict[str, Tensor | None]


def draw(
    gate: str = "g", dtype: torch.dtype = torch.float32, packed: bool = False, width: int = 24, value_width: int = 40
) -> Named:
    """The tensors of a call: 261 steps, three heads of keys for six of values."""
    normal, wide = Draw(dtype, "cpu", 0).normal, torch.float64 if dtype is torch.float64 else torch.float32
    batch, sequences = (1, len(OFFSETS) - 1) if packed else (2, 2)
    inputs: Named = dict.fromkeys(NAMES)
    inputs["q"] = normal("q", (batch, 261, 3, width))
    inputs["k"] = normal("k", (batch, 261, 3, width), std=width**-0.5)
    inputs["v"] = normal("v", (batch, 261, 6, value_width))
    inputs["initial_state"] = normal("initial_state", (sequences, 6, width, value_width), dtype=wide)
    if gate:
        shape = (batch, 261, 6) if gate == "g" else (6,)
        inputs[gate] = Draw(dtype, "cpu", 0).decay(gate, shape, low=-0.5)
    return inputs


def run(form: str, inputs: Named, offsets: tuple[int, ...] | None = None, reverse: bool = True) -> dict[str, Tensor]:
    """Outputs and every gradient, from the launchers."""
    forward, backward = FORMS[form]
    q, k, v, g, g_gamma, state = (inputs[name] for name in NAMES)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    o, final = forward(q, k, v, g, g_gamma, None, state, True, False, cu_seqlens, None, 16, reverse=reverse)
    do = inputs.get("do", Draw(o.dtype, "cpu", 1).normal("do", o.shape))
    dfinal = inputs.get("dfinal", Draw(final.dtype, "cpu", 1).normal("dfinal", final.shape))
    wanted = [x is not None for x in (q, k, v, g, g_gamma, state)]
    saved = (q, k, v, g, g_gamma, state, cu_seqlens, do, dfinal)
    grads = backward(*saved, None, False, 16, wanted, reverse=reverse)
    found = dict(zip((f"d{name}" for name in NAMES), grads, strict=True))
    return {"o": o, "final_state": final} | {name: x for name, x in found.items() if x is not None}


def turned(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Steps of a dense batch in the other order."""
    fixed = ("g_gamma", "dg_gamma", "initial_state", "dinitial_state", "final_state", "dfinal")
    return {name: x if x is None or name in fixed else x.flip(1) for name, x in values.items()}


@pytest.fixture(params=["compiled", "without-kernels"])
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "compiled":
        yield
        return
    with mock.patch.object(compiled, "library", return_value=None):
        yield


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("gate", ["g", "g_gamma", ""], ids=["per-step", "constant", "none"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("_kernels")
def test_numbers(form: str, gate: str, packed: bool) -> None:
    """Against the recurrence in float64, which walks backwards itself."""
    inputs, offsets = draw(gate, packed=packed), OFFSETS if packed else None
    found = run(form, inputs, offsets)
    wide = {name: None if x is None else x.double().requires_grad_() for name, x in inputs.items()}
    q, k, v, g, g_gamma, state = (wide[name] for name in NAMES)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    o, final = reference.recurrent(q, k, v, g, g_gamma, None, state, True, False, cu_seqlens)
    arriving = [Draw(torch.float64, "cpu", 1).normal(name, y.shape) for name, y in (("do", o), ("dfinal", final))]
    leaves = {name: x for name, x in wide.items() if x is not None}
    grads = torch.autograd.grad([o, final], list(leaves.values()), [x.float().double() for x in arriving])
    truth = {"o": o, "final_state": final} | {f"d{n}": x for n, x in zip(leaves, grads, strict=True)}
    assert found.keys() == truth.keys()
    for name, x in found.items():
        numerics.close(x.double(), truth[name].detach(), torch.float32)


@pytest.mark.parametrize("gate", ["g", "g_gamma", ""], ids=["per-step", "constant", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_forward_walk_of_the_steps_in_the_other_order(form: str, gate: str) -> None:
    inputs = draw(gate, torch.bfloat16)
    inputs["do"] = torch.ones_like(inputs["v"])
    found, expected = run(form, inputs), turned(run(form, turned(inputs), reverse=False))
    for name, x in expected.items():
        if name == "dg_gamma":  # a sum over time, in the other order
            numerics.close(found[name], x)
        else:
            assert torch.equal(found[name], x), name


@pytest.mark.parametrize("form", FORMS)
def test_any_strides(form: str) -> None:
    inputs = draw()
    found = run(form, {name: None if x is None else strided(x) for name, x in inputs.items()})
    assert all(torch.equal(found[name], x) for name, x in run(form, inputs).items())


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_alone_or_in_a_pack(form: str) -> None:
    inputs = draw(packed=True)
    inputs["do"] = Draw(torch.float32, "cpu", 1).normal("do", inputs["v"].shape)
    inputs["dfinal"] = Draw(torch.float32, "cpu", 1).normal("dfinal", inputs["initial_state"].shape)
    states = ("initial_state", "dinitial_state", "final_state", "dfinal")
    together = run(form, inputs, OFFSETS)
    for n, (start, end) in enumerate(pairwise(OFFSETS)):

        def own(values: dict[str, Tensor], n: int = n, start: int = start, end: int = end) -> dict[str, Tensor]:
            return {
                name: x if x is None else x[n : n + 1] if name in states else x[:, start:end]
                for name, x in values.items()
            }

        alone, expected = run(form, own(inputs)), own(together)
        assert all(torch.equal(x, expected[name]) for name, x in alone.items())


@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_threads_does_not_change_a_bit(form: str) -> None:
    inputs = draw(width=64, value_width=64)
    assert inputs["v"].numel() * 64 >= compiled.TOGETHER
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(form, inputs))
    finally:
        torch.set_num_threads(before)
    for a, b in pairwise(results):
        assert all(torch.equal(a[name], b[name]) for name in a)
