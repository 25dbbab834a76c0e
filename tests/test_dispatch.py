"""Choosing a form: what `explain` says for each kind of call, and that a symbolic size adds no guard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

import fla_ops
from fla_ops import launch
from fla_ops.simple_gla import forms
from tests.contract.helpers import ours

FORWARD = {
    "recurrent_up_to": 24,
    "parallel_up_to": 8,
    "parallel_up_to_scores": 2000,
    "fused_from_heads": 4,
    "fused_from_time": 65,
}
TRAINING = FORWARD | {"recurrent_up_to": 2, "parallel_up_to": 0, "parallel_up_to_scores": 0}


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    """A table made up for these tests: every rule decides something."""

    def crossovers(family: str, device: str, gradient: bool) -> dict[str, int]:
        assert (family, device) in {("simple_gla", "cpu"), ("simple_gla", "meta")}
        return TRAINING if gradient else FORWARD

    with (
        mock.patch.object(forms, "crossovers", crossovers),
        mock.patch.object(torch, "get_num_threads", return_value=2),
    ):
        yield


def call(time: int = 300, batch: int = 1, heads: int = 2, device: str = "cpu", **arguments: Any) -> dict[str, Any]:
    """Arguments of simple_gla."""
    q, k = (torch.zeros(batch, time, heads, 4, device=device) for _ in range(2))
    return {"q": q, "k": k, "v": torch.zeros(batch, time, heads, 5, device=device)} | arguments


def chosen(**arguments: Any) -> str:
    return fla_ops.explain(fla_ops.simple_gla, **arguments).form.name


@pytest.mark.parametrize(
    ("arguments", "form"),
    [
        pytest.param(call(time=8, batch=20), "parallel", id="few-steps-of-many"),
        pytest.param(call(time=30), "parallel", id="few-scores"),
        pytest.param(call(time=8, output_final_state=True), "fused_recurrent", id="few-steps-with-a-state"),
        pytest.param(call(time=24, batch=2), "fused_recurrent", id="last-short-length"),
        pytest.param(call(time=25, batch=2), "chunk", id="first-length-that-is-not-short"),
        pytest.param(call(time=64, batch=2), "chunk", id="many-heads-for-too-short-a-time"),
        pytest.param(call(time=65, batch=2), "fused_chunk", id="many-heads"),
        pytest.param(call(time=5000), "chunk", id="few-heads"),
        pytest.param(call(cu_seqlens=torch.tensor([0, 1, 300])), "fused_chunk", id="packed-sequences-count-as-batch"),
        pytest.param(call(time=16, reverse=True), "fused_recurrent", id="backwards-without-the-quadratic-form"),
        pytest.param(call(time=5000, reverse=True, output_final_state=True), "chunk", id="backwards-for-long"),
        pytest.param(call(mode="parallel"), "parallel", id="named"),
        pytest.param(call(mode="chunk", time=1), "chunk", id="named-against-the-preference"),
        pytest.param(call(time=24, batch=2, device="meta"), "fused_recurrent", id="elsewhere"),
    ],
)
def test_choice(arguments: dict[str, Any], form: str) -> None:
    assert chosen(**arguments) == form


def test_a_cpu_walks_along_key_heads_where_each_thread_has_enough_of_them() -> None:
    arguments = call(batch=2)
    assert chosen(**arguments) == "fused_chunk"
    shared = arguments | {"q": arguments["q"][:, :, :1], "k": arguments["k"][:, :, :1]}
    assert chosen(**shared) == "chunk"
    with mock.patch.object(torch, "get_num_threads", return_value=8):
        assert chosen(**arguments) == "chunk"
        assert chosen(**call(batch=8)) == "fused_chunk"


def test_gradient_is_wanted_only_where_it_is_recorded() -> None:
    arguments = call(time=24, batch=2)
    arguments["v"].requires_grad_()
    assert chosen(**arguments) == "chunk"
    with torch.no_grad():
        assert chosen(**arguments) == "fused_recurrent"


def test_explanation_lists_every_refusal() -> None:
    text = str(fla_ops.explain(fla_ops.simple_gla, **call(reverse=True, output_final_state=True)))
    assert text.startswith("torch.ops.fla.chunk_simple_gla (chunk)")
    assert "order of preference" in text
    assert "  parallel refuses: reverse=True runs time backwards" in text
    assert "the quadratic form has no state" in text
    lightning = {name: x for name, x in call(reverse=True).items() if name in ("q", "k", "v", "reverse")}
    text = str(fla_ops.explain(fla_ops.lightning_attn, **lightning, layer_idx=0, num_layers=2))
    for form in ("chunk", "fused_chunk"):
        assert f"  {form} refuses: reverse=True runs time backwards" in text


def test_explanation_refuses_what_the_call_would() -> None:
    arguments = call()
    with pytest.raises(ValueError, match=r"k must be \[B, T, HK, K\]"):
        fla_ops.explain(fla_ops.simple_gla, **arguments | {"k": arguments["k"][..., 1:]})


def test_explanation_says_where_a_form_runs_the_kernels_of_another() -> None:
    on_gpu = mock.Mock(v=mock.Mock(device=torch.device("cuda")), q=mock.Mock(shape=(1, 8, 2, 300)))
    with mock.patch.object(launch, "covers", return_value=False):
        assert forms.note_chunk_kernels(on_gpu) == [
            "K = 300 is too wide for one program to hold the state: the chunk form's kernels run"
        ]


def test_explain_computes_nothing() -> None:
    arguments = call(device="meta", time=2**20)
    assert fla_ops.explain(fla_ops.simple_gla, **arguments).form.signature.name in fla_ops.ops()


@pytest.mark.parametrize("function", [fla_ops.chunk_simple_gla, torch.ops.fla.simple_gla, len])
def test_explain_wants_a_dispatcher(function: Any) -> None:
    with pytest.raises(TypeError, match=r"explain wants a dispatcher such as fla_ops\.simple_gla, got"):
        fla_ops.explain(function, **call())


@pytest.mark.usefixtures("fresh_compiler")
def test_a_symbolic_length_takes_the_general_form_without_a_guard() -> None:
    recorder = AotEagerAndRecordGraphs()
    counter = CompileCounterWithBackend(recorder)
    run = torch.compile(fla_ops.simple_gla, fullgraph=True, backend=counter, dynamic=True)
    for time in (300, FORWARD["recurrent_up_to"], 2, 5000):
        with torch._dynamo.config.patch(error_on_recompile=time != 300):
            run(**call(time=time, batch=3))
    assert counter.frame_count == 1
    assert ours(recorder.fw_graphs) == ["chunk_simple_gla"]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_known_length_takes_the_form_that_suits_it() -> None:
    recorder = AotEagerAndRecordGraphs()
    torch.compile(fla_ops.simple_gla, fullgraph=True, backend=recorder, dynamic=False)(**call(time=24, batch=2))
    assert ours(recorder.fw_graphs) == ["fused_recurrent_simple_gla"]
