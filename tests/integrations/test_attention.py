"""Softmax attention for transformers: what a decay and a window can say, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import StaticCache
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import fla_ops.integrations.transformers as integration
from fla_ops.integrations.softmax_attention import CausalMask, _newest, attention, last_rows, mask
from tests.integrations.models import build, padding, prompt
from tests.numerics import close

BATCH, TIME, WINDOW = 2, 20, 6


class Layer(torch.nn.Module):
    """What an attention function of transformers is told about its layer."""

    is_causal = True
    num_key_value_groups = 2


def heads(steps: int = TIME, time: int = TIME) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(BATCH, 4, steps, 8), torch.randn(BATCH, 2, time, 8), torch.randn(BATCH, 2, time, 5)


def left_padding() -> torch.Tensor:
    real = torch.ones(BATCH, TIME, dtype=torch.bool)
    real[1, :7] = False
    return real


NO_PADDING = torch.zeros(BATCH, dtype=torch.long)
MASKS = [
    pytest.param({"mask_function": causal_mask_function}, id="causal"),
    pytest.param({"mask_function": causal_mask_function, "attention_mask": left_padding()}, id="left-padding"),
    pytest.param(
        {
            "mask_function": sliding_window_causal_mask_function(WINDOW),
            "local_size": WINDOW,
            "attention_mask": left_padding(),
        },
        id="window-and-left-padding",
    ),
    pytest.param(
        {"mask_function": chunked_causal_mask_function(WINDOW, NO_PADDING), "local_size": WINDOW}, id="chunks"
    ),
    pytest.param(
        {
            "mask_function": chunked_causal_mask_function(WINDOW, torch.tensor([0, 7])),
            "local_size": WINDOW,
            "attention_mask": left_padding(),
        },
        id="chunks-after-left-padding",
    ),
]


@pytest.mark.parametrize("how", MASKS)
@pytest.mark.parametrize("steps", [TIME, 8, 1], ids=["whole", "piece", "newest-step"])
def test_attention_equals_the_matrix_of_the_mask(how: dict[str, Any], steps: int) -> None:
    query, key, value = heads(steps)
    sizes = {"batch_size": BATCH, "q_length": steps, "kv_length": TIME, "q_offset": TIME - steps, "kv_offset": 0}
    with torch.no_grad():
        o, weights = attention(Layer(), query, key, value, mask(**sizes, **how), scaling=0.3)
    assert weights is None
    matrix = sdpa_mask(**sizes, **how, allow_is_causal_skip=False)
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, matrix, scale=0.3).transpose(1, 2)
    real = left_padding()[:, -steps:] if "attention_mask" in how else torch.ones(BATCH, steps, dtype=torch.bool)
    close(o[real], expected[real])


@pytest.mark.parametrize("how", MASKS)
@pytest.mark.parametrize("sink", [False, True], ids=["", "sinks"])
def test_the_operator_for_newest_steps_equals_dense_products(how: dict[str, Any], sink: bool) -> None:
    """A GPU takes the operator, a CPU dense products."""
    query, key, value = heads(1)
    decay, window = mask(BATCH, 1, TIME, TIME - 1, **how)
    sinks = torch.randn(4) if sink else None
    dense = last_rows(query, key, value, decay, 0.3, window, sinks)
    by_step = (x.transpose(1, 2) for x in (query, key, value))
    g = None if decay is None else decay[..., None].expand(-1, -1, 4)
    close(_newest(*by_step, g, 0.3, window, sinks), dense)


def test_nothing_is_built_for_what_needs_no_reset() -> None:
    sizes = {"batch_size": BATCH, "q_length": TIME, "kv_length": TIME}
    everything = torch.ones(BATCH, TIME, dtype=torch.bool)
    assert mask(**sizes, mask_function=causal_mask_function, attention_mask=everything) == CausalMask(None, None)
    windowed = sliding_window_causal_mask_function(WINDOW)
    assert mask(**sizes, mask_function=windowed, local_size=WINDOW) == CausalMask(None, WINDOW)


def test_padding_between_tokens_is_refused() -> None:
    real = torch.ones(BATCH, TIME, dtype=torch.bool)
    real[0, 5:9] = False
    with pytest.raises(NotImplementedError, match="padding before or after the tokens of a row, not between them"):
        mask(BATCH, TIME, TIME, mask_function=causal_mask_function, attention_mask=real)


def test_masks_that_look_ahead_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="causal masks, got a mask function by which a step sees the next"):
        mask(BATCH, TIME, TIME, mask_function=bidirectional_mask_function)


def test_overlaid_masks_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="a mask function that the model overlays"):
        mask(BATCH, TIME, TIME, mask_function=causal_mask_function, use_vmap=True)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"dropout": 0.1}, "dropout"),
        ({"position_bias": torch.zeros(1, 4, TIME, TIME)}, "position_bias"),
        ({"is_causal": False}, "attention that is not causal"),
        ({"attention_mask": torch.zeros(BATCH, 1, TIME, TIME)}, "a mask that is not made by fla_ops"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_has_no_operator_is_refused_by_name(asked: dict[str, Any], name: str) -> None:
    call = {"attention_mask": None, **asked}
    with pytest.raises(NotImplementedError, match=f"^Layer asks for {name}, which fla_ops does not serve"):
        attention(Layer(), *heads(), **call)


def test_models_with_a_soft_cap_are_refused() -> None:
    integration.enable()
    model = build("gemma2")
    model.set_attn_implementation("fla_ops")
    with pytest.raises(NotImplementedError, match="asks for softcap"):
        model(prompt())


def test_static_cache_is_refused() -> None:
    model = integration.patch(build("gpt_oss"))
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(NotImplementedError, match="a static cache"):
        model(prompt(), past_key_values=cache)


def test_a_mask_of_the_users_own_is_refused() -> None:
    model, tokens = integration.patch(build("gpt_oss")), prompt()
    with pytest.raises(NotImplementedError, match="a mask that is not made by fla_ops"):
        model(tokens, attention_mask=torch.ones(2, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool))


@pytest.mark.parametrize("piece", [1, 4], ids=["steps", "pieces"])
def test_a_padded_prompt_goes_on_in_sliding_caches(piece: int) -> None:
    """The cache keeps fewer keys than the mask has columns."""
    model, tokens = build("gpt_oss"), prompt()
    real = padding(tokens, "left")
    results = []
    for on in (False, True):
        if on:
            integration.patch(model)
        with torch.no_grad():
            outputs = model(tokens[:, :13], attention_mask=real[:, :13], use_cache=True)
            logits = []
            for end in range(13 + piece, 38, piece):
                outputs = model(
                    tokens[:, end - piece : end],
                    attention_mask=real[:, :end],
                    past_key_values=outputs.past_key_values,
                )
                logits.append(outputs.logits)
        results.append(torch.cat(logits, 1))
    close(results[1], results[0])
