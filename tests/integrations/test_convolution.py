"""The functions of causal_conv1d against their equations, tap by tap in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fla_ops.integrations.mamba import causal_conv1d_fn, causal_conv1d_update
from tests.integrations.gradients import against_reference
from tests.numerics import close

BATCH, TIME = 2, 21
LENGTHS = (6, 0, 1, 14)
CHANNELS, TAPS = 6, 4


def conv_inputs(time: int = TIME) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x": torch.randn(BATCH, CHANNELS, time).double(),
        "weight": torch.randn(CHANNELS, TAPS).double(),
        "bias": torch.randn(CHANNELS).double(),
    }


def conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tap by tap, with silu; the last steps too."""
    before = x.new_zeros(*x.shape[:2], TAPS - 1) if initial_states is None else initial_states
    window = torch.cat([before, x], -1)
    o = sum(window[..., i : i + x.shape[-1]] * weight[:, i, None] for i in range(TAPS))
    return F.silu(o + bias[:, None]), window[..., -(TAPS - 1) :]


@pytest.mark.parametrize("time", [pytest.param(TIME, id="long"), pytest.param(2, id="shorter-than-the-taps")])
@pytest.mark.parametrize("states", [False, True], ids=["from-zeros", "from-states"])
def test_convolution(time: int, states: bool) -> None:
    inputs = conv_inputs(time)
    if states:
        inputs["initial_states"] = torch.randn(BATCH, CHANNELS, TAPS - 1).double()

    def ours(**inputs: Any) -> Any:
        return causal_conv1d_fn(**inputs, return_final_states=True, activation="silu")

    against_reference(inputs, ours, conv_reference)


def test_convolution_fills_the_states_it_is_given() -> None:
    inputs, out = conv_inputs(), torch.zeros(BATCH, CHANNELS, TAPS - 1).double()
    _, final = causal_conv1d_fn(**inputs, return_final_states=True, final_states_out=out)
    assert final is out
    assert torch.equal(out, inputs["x"][..., -3:])


@pytest.mark.parametrize("lengths", [LENGTHS, (1, 1, 1)], ids=["long", "shorter-than-the-taps"])
def test_packed_convolution(lengths: tuple[int, ...]) -> None:
    inputs = conv_inputs(sum(lengths))
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(BATCH, -1)

    def ours(**inputs: Any) -> Any:
        return (causal_conv1d_fn(**inputs, seq_idx=numbers, activation="swish"),)

    def truth(x: Tensor, **inputs: Any) -> Any:
        return (torch.cat([conv_reference(part, **inputs)[0] for part in x.split(lengths, -1) if part.shape[-1]], -1),)

    against_reference(inputs, ours, truth)


@pytest.mark.parametrize("length", [TAPS - 1, TAPS, 7], ids=["least", "as-transformers", "longer"])
@pytest.mark.parametrize("time", [1, 3], ids=["one-step", "three-steps"])
def test_convolution_update(length: int, time: int) -> None:
    inputs = conv_inputs(time)
    state = torch.randn(BATCH, CHANNELS, length).double()
    expected, _ = conv_reference(**inputs, initial_states=state[..., -3:])
    after = torch.cat([state, inputs["x"]], -1)[..., -length:]
    close(causal_conv1d_update(inputs.pop("x"), state, **inputs, activation="silu"), expected)
    assert torch.equal(state, after)


def test_convolution_update_of_one_step_without_its_axis() -> None:
    inputs = conv_inputs(1)
    state = torch.randn(BATCH, CHANNELS, TAPS).double()
    other = state.clone()
    x = inputs.pop("x")
    o = causal_conv1d_update(x[..., 0], state, **inputs)
    assert torch.equal(o, causal_conv1d_update(x, other, **inputs)[..., 0])
    assert torch.equal(state, other)


def test_convolution_update_in_a_ring() -> None:
    inputs = conv_inputs()
    x, length = inputs.pop("x"), 5
    expected, _ = conv_reference(x, **inputs)
    ring, seen = torch.zeros(BATCH, CHANNELS, length).double(), torch.tensor([0, 12])
    outputs = []
    for part in x.split((1, 2, 1, 3, 2, 3, 1, 3, 2, 3), -1):
        outputs.append(causal_conv1d_update(part, ring, **inputs, activation="silu", cache_seqlens=seen))
        seen = seen + part.shape[-1]
    close(torch.cat(outputs, -1), expected)


@pytest.mark.parametrize("rows", [[3, 0], [-1, 2], [2, -1], [-1, -1]], ids=str)
def test_convolution_update_in_a_pool(rows: list[int]) -> None:
    inputs = conv_inputs(1)
    x = inputs.pop("x")
    pool = torch.randn(5, CHANNELS, TAPS).double()
    before = pool.clone()
    o = causal_conv1d_update(x, pool, **inputs, conv_state_indices=torch.tensor(rows))
    for i, row in enumerate(rows):
        if row < 0:
            assert not o[i].any()
            continue
        alone = before[row : row + 1].clone()
        close(o[i], causal_conv1d_update(x[i : i + 1], alone, **inputs)[0])
        assert torch.equal(pool[row], alone[0])
    untouched = [row for row in range(5) if row not in rows]
    assert torch.equal(pool[untouched], before[untouched])


def test_convolution_says_what_is_wrong() -> None:
    inputs = conv_inputs()
    x, states = inputs["x"], torch.zeros(BATCH, CHANNELS, TAPS - 1).double()
    with pytest.raises(ValueError, match="activation must be None, silu or swish, got 'gelu'"):
        causal_conv1d_fn(**inputs, activation="gelu")
    with pytest.raises(ValueError, match="seq_idx goes without states"):
        causal_conv1d_fn(**inputs, seq_idx=torch.zeros(BATCH, TIME), initial_states=states)
    with pytest.raises(ValueError, match=r"conv_state must hold at least W - 1 = 3 steps, got 2"):
        causal_conv1d_update(x[..., 0], states[..., :2], inputs["weight"])
