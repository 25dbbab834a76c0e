"""A check against code that others wrote: MiniMax in transformers, its layer replaced as in the example."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fla_ops
from tests import numerics

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimax_lightning.py"
BLOCK = 16  # of MiniMax's loop


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location("minimax_lightning", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(example: ModuleType) -> tuple[nn.Module, nn.Module]:
    """The model as it is, and a copy with the replacement."""
    torch.manual_seed(0)
    theirs = example.small_model(layers=3, width=48, heads=3, block_size=BLOCK)
    return theirs, example.replace_lightning_attention(copy.deepcopy(theirs))


def tokens(batch: int, time: int) -> Tensor:
    """A prompt."""
    return torch.randint(0, 256, (batch, time), generator=torch.Generator().manual_seed(time))


def hidden_states(model: nn.Module, prompt: Tensor, **options: Any) -> list[Tensor]:
    """What enters each layer, and what leaves the last."""
    return list(model(prompt, output_hidden_states=True, **options).hidden_states)


def test_every_lightning_layer_is_replaced(example: ModuleType, models: tuple[nn.Module, nn.Module]) -> None:
    theirs, ours = (example.lightning_layers(model) for model in models)
    assert len(theirs) == len(ours) == 2
    assert all(isinstance(layer, example.LightningAttention) for layer in ours)


def test_the_decay_is_theirs(example: ModuleType, models: tuple[nn.Module, nn.Module]) -> None:
    for layer in example.lightning_layers(models[0]):
        decay = fla_ops.lightning_decay(layer.num_attention_heads, layer.layer_idx, layer.num_hidden_layers, "alibi")
        torch.testing.assert_close(decay, -layer.slope_rate.flatten())


@pytest.mark.parametrize(
    "time",
    [
        pytest.param(1, id="one-step"),
        pytest.param(BLOCK, id="one-block"),
        pytest.param(3 * BLOCK + 5, id="ragged-block"),
        pytest.param(150, id="past-our-chunks"),
    ],
)
def test_hidden_states(models: tuple[nn.Module, nn.Module], time: int) -> None:
    with torch.no_grad():
        theirs, ours = (hidden_states(model, tokens(2, time)) for model in models)
    for theirs_after, ours_after in zip(theirs, ours, strict=True):
        numerics.close(ours_after, theirs_after)


def test_hidden_states_of_padded_prompts(models: tuple[nn.Module, nn.Module]) -> None:
    mask = torch.ones(2, 41, dtype=torch.int64)
    mask[1, :17] = 0  # padded on the left, as for generation
    with torch.no_grad():
        theirs, ours = (hidden_states(model, tokens(2, 41), attention_mask=mask) for model in models)
    for theirs_after, ours_after in zip(theirs, ours, strict=True):
        numerics.close(ours_after, theirs_after)


def test_gradients(models: tuple[nn.Module, nn.Module]) -> None:
    prompt = tokens(2, 53)
    found = []
    for model in models:
        model.zero_grad()
        model(prompt, labels=prompt).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    theirs, ours = found
    assert theirs.keys() == ours.keys()
    assert sum("qkv_proj" in name for name in ours) == 2
    for name, gradient in theirs.items():
        numerics.close(ours[name], gradient)


def test_decoding_step_by_step(models: tuple[nn.Module, nn.Module]) -> None:
    """Through the model's own cache: the prompt, then one step after the other, updated in place."""
    text = tokens(2, 40)
    with torch.no_grad():
        whole = models[1](text).logits
        caches: list[Any] = [None, None]
        for start, end in ((0, 21), *((t, t + 1) for t in range(21, 40))):
            outputs = [m(text[:, start:end], past_key_values=c) for m, c in zip(models, caches, strict=True)]
            caches = [output.past_key_values for output in outputs]
            theirs, ours = (output.logits for output in outputs)
            numerics.close(ours, theirs)
            numerics.close(ours, whole[:, start:end])


def test_a_long_prompt_in_pieces(models: tuple[nn.Module, nn.Module]) -> None:
    text = tokens(2, 90)
    with torch.no_grad():
        whole = models[0](text).logits
        cache = None
        for start, end in ((0, 33), (33, 70), (70, 90)):
            output = models[1](text[:, start:end], past_key_values=cache)
            cache = output.past_key_values
            numerics.close(output.logits, whole[:, start:end])


def test_generated_tokens(models: tuple[nn.Module, nn.Module]) -> None:
    theirs, ours = (model.generate(tokens(2, 37), max_new_tokens=24, do_sample=False) for model in models)
    assert theirs.shape == (2, 61)
    assert torch.equal(theirs, ours)


def test_a_beam_search_moves_states_between_rows(models: tuple[nn.Module, nn.Module]) -> None:
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 3}
    theirs, ours = (model.generate(tokens(2, 20), **options) for model in models)
    assert torch.equal(theirs, ours)
