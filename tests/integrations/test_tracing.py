"""Served models in one graph: torch.compile(fullgraph=True), torch.export with dynamic sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fla_ops.integrations.transformers as integration
from tests.integrations.models import EVERY, build, padding, prompt
from tests.integrations.test_models import serve
from tests.numerics import close

pytestmark = pytest.mark.usefixtures("fresh_compiler")

QUICK = ("mamba2", "qwen3_next", "gpt_oss")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EVERY])
def test_one_graph_with_padding(name: str) -> None:
    """Captured and run by Dynamo: what the compiler would get."""
    model, tokens = serve(name, build(name)), prompt()
    mask = padding(tokens, "left")
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        result = compiled(tokens, attention_mask=mask, use_cache=False).logits
    close(result[mask.bool()], expected[mask.bool()])


def train_compiled(name: str, backend: str) -> None:
    """The gradients of compiled code are those without it."""
    model, tokens = serve(name, build(name)), prompt()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend=backend)(tokens, labels=tokens, use_cache=False).loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            close(parameter.grad, expected[key])


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_one_graph_forward_and_backward(name: str) -> None:
    train_compiled(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_compiled_training(name: str) -> None:
    train_compiled(name, "inductor")


@pytest.mark.slow
def test_compiled_packed_training() -> None:
    model, tokens = integration.patch(build("mamba2")).train().backbone, prompt(1)
    seq_idx = (torch.arange(tokens.shape[1]) >= 14).int()[None]
    expected = model(tokens, seq_idx=seq_idx).last_hidden_state
    close(torch.compile(model, fullgraph=True)(tokens, seq_idx=seq_idx).last_hidden_state, expected)


def test_switching_off_reaches_compiled_code() -> None:
    model, tokens = integration.patch(build("mamba2")), prompt()
    graphs = []

    def record(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=record)
    with torch.no_grad():
        compiled(tokens, use_cache=False)
        integration.disable()
        compiled(tokens, use_cache=False)
    ours = [any(target.startswith("fla.") for target in graph) for graph in graphs]
    assert ours == [True, False]


@pytest.mark.slow
def test_padding_between_tokens_in_compiled_code() -> None:
    """Where no value can be looked at, an assertion is part of the graph."""
    model, tokens = integration.patch(build("gpt_oss")), prompt()
    mask = torch.ones_like(tokens)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        compiled(tokens, attention_mask=mask, use_cache=False)
        mask[0, 5:9] = 0
        with pytest.raises(RuntimeError, match="padding before or after the tokens of a row"):
            compiled(tokens, attention_mask=mask, use_cache=False)


class Logits(torch.nn.Module):
    """A model whose outputs are one tensor."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_export_with_dynamic_sizes(name: str) -> None:
    model = Logits(serve(name, build(name)))
    tokens, dims = prompt(), {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    inputs = (tokens, padding(tokens, "left"))
    program = torch.export.export(model, inputs, dynamic_shapes=(dims, dims)).module()
    for batch, time in ((3, 50), (2, 17)):
        other = prompt(batch, time)
        mask = padding(other, "left")
        with torch.no_grad():
            close(program(other, mask)[mask.bool()], model(other, mask)[mask.bool()])
