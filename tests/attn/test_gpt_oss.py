"""A check against code that others wrote: gpt-oss in transformers, its attention replaced as in the example."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests import numerics

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt_oss_attention.py"
WINDOW = 6


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location("gpt_oss_attention", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # where the compiler looks for what a function refers to
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def models(example: ModuleType) -> tuple[nn.Module, nn.Module]:
    """The model on its eager attention, and a copy on fla_ops."""
    torch.manual_seed(0)
    theirs = example.small_model(layers=2, width=32, heads=4, window=WINDOW)
    return theirs, example.use_fla_ops(copy.deepcopy(theirs))


def tokens(batch: int, time: int) -> Tensor:
    """A prompt."""
    return torch.randint(1, 256, (batch, time), generator=torch.Generator().manual_seed(time))


def logits_and_gradients(model: nn.Module, call: nn.Module, prompt: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradient of a function of them for every parameter."""
    logits = call(input_ids=prompt, use_cache=False).logits
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(logits.sin().sum(), parameters)
    return {"logits": logits, **dict(zip(names, found, strict=True))}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Both are float32 computations of one thing, some layers deep."""
    assert found.keys() == expected.keys()
    for name, y in expected.items():
        assert y.abs().max() > 0, f"{name} would not show a difference"
        numerics.close(found[name], y)


def test_the_model_has_what_is_to_be_shown(models: tuple[nn.Module, nn.Module]) -> None:
    config = models[0].config
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert all(p.abs().max() > 0 for name, p in models[0].named_parameters() if name.endswith("sinks"))


@pytest.mark.parametrize("time", [1, WINDOW, 19], ids=["one-step", "one-window", "several-windows"])
def test_logits_and_gradients(models: tuple[nn.Module, nn.Module], time: int) -> None:
    theirs, ours = models
    prompt = tokens(2, time)
    with torch.no_grad():
        numerics.close(ours(prompt, use_cache=False).logits, theirs(prompt, use_cache=False).logits)
    if time > 1:  # one step against one sink leaves queries and keys without a gradient in places
        check_equal(logits_and_gradients(ours, ours, prompt), logits_and_gradients(theirs, theirs, prompt))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_as_one_graph(models: tuple[nn.Module, nn.Module]) -> None:
    theirs, ours = models[0], copy.deepcopy(models[1])
    ours.set_experts_implementation("batched_mm")  # the loop over experts that is used in eager mode reads indices back
    counter = CompileCounterWithBackend("aot_eager")
    prompt = tokens(2, 19)
    found = logits_and_gradients(ours, torch.compile(ours, fullgraph=True, backend=counter), prompt)
    assert counter.frame_count == 1
    check_equal(found, logits_and_gradients(theirs, theirs, prompt))


@pytest.mark.parametrize("batch", [1, 3])
def test_generated_tokens(models: tuple[nn.Module, nn.Module], batch: int) -> None:
    prompt = tokens(batch, 9)
    expected, found = (model.generate(prompt, max_new_tokens=8, do_sample=False) for model in models)
    assert torch.equal(found, expected)


def test_padding_is_refused(models: tuple[nn.Module, nn.Module]) -> None:
    prompt = tokens(2, 9)
    padding = torch.ones_like(prompt)
    padding[0, :3] = 0
    with pytest.raises(NotImplementedError, match="padded batches are not supported"):
        models[1](prompt, attention_mask=padding)
