"""Choosing a form: what `explain` says for each kind of call, and that a symbolic size adds no guard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

import fla_ops
from fla_ops.launch.crossovers import crossovers
from tests.contract.helpers import ours

CPU = crossovers("simple_gla", "cpu", gradient=False)
TRAINING = crossovers("simple_gla", "cpu", gradient=True)


def call(time: int = 300, batch: int = 1, heads: int = 2, device: str = "cpu", **arguments: Any) -> dict[str, Any]:
    """Arguments of simple_gla."""
    q, k = (torch.zeros(batch, time, heads, 4, device=device) for _ in range(2))
    return {"q": q, "k": k, "v": torch.zeros(batch, time, heads, 5, device=device)} | arguments


def chosen(**arguments: Any) -> str:
    return fla_ops.explain(fla_ops.simple_gla, **arguments).form.name


@pytest.mark.parametrize(
    ("arguments", "form"),
    [
        pytest.param(call(time=1), "fused_recurrent", id="one-step"),
        pytest.param(call(time=CPU["recurrent_up_to"]), "fused_recurrent", id="last-short-length"),
        pytest.param(call(reverse=True), "fused_recurrent", id="only-one-form-runs-backwards"),
        pytest.param(call(reverse=True, output_final_state=True), "fused_recurrent", id="backwards-with-a-state"),
        pytest.param(call(mode="parallel"), "parallel", id="named"),
        pytest.param(call(mode="chunk", time=1), "chunk", id="named-against-the-preference"),
        pytest.param(call(time=1, device="meta"), "fused_recurrent", id="one-step-elsewhere"),
    ],
)
def test_choice(arguments: dict[str, Any], form: str) -> None:
    assert chosen(**arguments) == form


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("time", [2, 40, 300, 5000])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_choice_follows_the_crossovers(time: int, gradient: bool, packed: bool) -> None:
    """The table decides, by length and by heads; any form that refuses is passed over."""
    arguments = call(time=time)
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, 1, time])
    if gradient:
        arguments["v"].requires_grad_()
    table, heads = (TRAINING if gradient else CPU), 2 * (2 if packed else 1)
    if time <= table["recurrent_up_to"]:
        expected = "fused_recurrent"
    elif time <= table["parallel_up_to"]:
        expected = "parallel"
    elif heads >= table["fused_from_heads"] and time >= table["fused_from_time"]:
        expected = "fused_chunk"
    else:
        expected = "chunk"
    assert chosen(**arguments) == expected
    arguments |= {"output_final_state": True}
    assert chosen(**arguments) == ("chunk" if expected == "parallel" else expected)


def test_gradient_is_wanted_only_where_it_is_recorded() -> None:
    arguments = call()
    arguments["v"].requires_grad_()
    length = CPU["recurrent_up_to"]
    if length == TRAINING["recurrent_up_to"]:
        pytest.skip("the table makes no difference between training and forward")
    short = {n: x[:, :length] if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    recorded = chosen(**short)
    with torch.no_grad():
        assert chosen(**short) == "fused_recurrent" != recorded


def test_explanation_lists_every_refusal() -> None:
    text = str(fla_ops.explain(fla_ops.simple_gla, **call(reverse=True, output_final_state=True)))
    assert text.startswith("torch.ops.fla.fused_recurrent_simple_gla (fused_recurrent)")
    assert "order of preference" in text
    for form in ("chunk", "fused_chunk", "parallel"):
        assert f"  {form} refuses: reverse=True runs time backwards" in text
    assert "the quadratic form has no state" in text


def test_explain_computes_nothing() -> None:
    arguments = call(device="meta", time=2**20)
    assert fla_ops.explain(fla_ops.simple_gla, **arguments).form.operator in fla_ops.ops()


@pytest.mark.parametrize("function", [fla_ops.chunk_simple_gla, torch.ops.fla.simple_gla, len])
def test_explain_wants_a_dispatcher(function: Any) -> None:
    with pytest.raises(TypeError, match=r"explain wants a dispatcher such as fla_ops\.simple_gla, got"):
        fla_ops.explain(function, **call())


@pytest.mark.usefixtures("fresh_compiler")
def test_a_symbolic_length_takes_the_general_form_without_a_guard() -> None:
    recorder = AotEagerAndRecordGraphs()
    counter = CompileCounterWithBackend(recorder)
    run = torch.compile(fla_ops.simple_gla, fullgraph=True, backend=counter, dynamic=True)
    for time in (300, CPU["recurrent_up_to"], 2, 5000):
        with torch._dynamo.config.patch(error_on_recompile=time != 300):
            run(**call(time=time, batch=3))
    assert counter.frame_count == 1
    assert ours(recorder.fw_graphs) == ["chunk_simple_gla"]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_known_length_takes_the_form_that_suits_it() -> None:
    recorder = AotEagerAndRecordGraphs()
    torch.compile(fla_ops.simple_gla, fullgraph=True, backend=recorder, dynamic=False)(**call(time=2))
    assert ours(recorder.fw_graphs) == ["fused_recurrent_simple_gla"]
