"""The functions of mamba_ssm against their equations, step by step in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fla_ops.integrations.mamba import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_chunk_scan_combined,
    selective_state_update,
)
from tests.integrations.gradients import against_reference
from tests.numerics import check, close

BATCH, TIME, HEADS, WIDTH, GROUPS, STATE = 2, 21, 4, 5, 2, 3
LENGTHS = (6, 0, 1, 14)


def scan_inputs(batch: int = BATCH, **also: Any) -> dict[str, Any]:
    """What every scan takes, in float64, and what the case adds to it."""
    torch.manual_seed(0)
    drawn = {
        "x": torch.randn(batch, TIME, HEADS, WIDTH),
        "dt": torch.randn(batch, TIME, HEADS),
        "A": -torch.rand(HEADS) - 0.1,
        "B": torch.randn(batch, TIME, GROUPS, STATE),
        "C": torch.randn(batch, TIME, GROUPS, STATE),
        "D": torch.randn(HEADS),
        "dt_bias": torch.randn(HEADS) - 1,
        "z": torch.randn(batch, TIME, HEADS, WIDTH),
        "initial_states": torch.randn(batch, HEADS, WIDTH, STATE),
    }
    drawn |= {"D-by-channel": torch.randn(HEADS, WIDTH), "states-of-sequences": torch.randn(4, HEADS, WIDTH, STATE)}
    needed = ("x", "dt", "A", "B", "C")
    named = {key: drawn[value] if isinstance(value, str) else value for key, value in also.items()}
    return {
        key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in ({key: drawn[key] for key in needed} | named).items()
    }


def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """One row of unpacked sequences, step by step."""
    batch, time, heads, width = x.shape
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    state = x.new_zeros(batch, heads, width, B.shape[-1]) if initial_states is None else initial_states
    outputs = []
    for t in range(time):
        decay = (A * dt[:, t]).exp()[..., None, None]
        state = state * decay + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1))
    o = torch.stack(outputs, 1) if outputs else torch.zeros_like(x)
    if D is not None:
        o = o + (D[:, None] if D.dim() == 1 else D) * x
    return (o if z is None else o * F.silu(z)), state


def packed_reference(**inputs: Any) -> tuple[Tensor, Tensor]:
    """The sequences of a batch of one, apart; states [sequences, H, P, N]."""
    states = inputs.pop("initial_states", None)
    parts = {key: inputs[key].split(LENGTHS, 1) if key in inputs else [None] * 4 for key in ("x", "dt", "B", "C", "z")}
    results = []
    for i in range(len(LENGTHS)):
        part = {key: value[i] for key, value in parts.items()}
        own = None if states is None else states[i : i + 1]
        results.append(reference(**{**inputs, **part, "initial_states": own}))
    return torch.cat([o for o, _ in results], 1), torch.cat([state for _, state in results])


SOFTPLUS = {"dt_bias": "dt_bias", "dt_softplus": True}
CASES = [
    pytest.param({}, id="plain-and-negative-dt-clamped"),
    pytest.param({**SOFTPLUS, "D": "D"}, id="softplus-bias-skip"),
    pytest.param({**SOFTPLUS, "D": "D-by-channel", "z": "z"}, id="skip-by-channel-and-gate"),
    pytest.param({**SOFTPLUS, "dt_limit": (0.1, 0.4)}, id="limits"),
    pytest.param({**SOFTPLUS, "initial_states": "initial_states"}, id="initial-states"),
]


@pytest.mark.parametrize("case", CASES)
def test_scan(case: dict[str, Any]) -> None:
    def ours(**inputs: Any) -> Any:
        return mamba_chunk_scan_combined(**inputs, chunk_size=16, return_final_states=True)

    against_reference(scan_inputs(**case), ours, reference)


PACKED = {**SOFTPLUS, "D": "D", "z": "z"}


def offsets() -> Tensor:
    return torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])


def test_packed_scan_by_offsets() -> None:
    inputs = scan_inputs(1, **PACKED, initial_states="states-of-sequences")

    def ours(**inputs: Any) -> Any:
        return mamba_chunk_scan_combined(**inputs, chunk_size=16, cu_seqlens=offsets(), return_varlen_states=True)

    against_reference(inputs, ours, packed_reference)


def test_packed_scan_by_numbers() -> None:
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None].int()

    def ours(**inputs: Any) -> Any:
        return mamba_chunk_scan_combined(**inputs, chunk_size=16, seq_idx=numbers, return_final_states=True)

    def truth(**inputs: Any) -> Any:
        o, states = packed_reference(**inputs)
        return o, states[-1:]

    against_reference(scan_inputs(1, **PACKED), ours, truth)


def test_initial_state_belongs_to_sequence_0() -> None:
    inputs = scan_inputs(**SOFTPLUS, initial_states="initial_states")
    numbers = torch.ones(BATCH, TIME, dtype=torch.int32)
    numbers[0, :8] = 0  # row 1 begins with another sequence
    o = mamba_chunk_scan_combined(**inputs, chunk_size=16, seq_idx=numbers)
    expected, _ = reference(**inputs)
    fresh, _ = reference(**{**inputs, "initial_states": None})
    close(o[0, :8], expected[0, :8])
    close(o[1], fresh[1])


def test_what_a_scan_returns() -> None:
    inputs = scan_inputs(1)
    call = {**inputs, "chunk_size": 16, "cu_seqlens": offsets()}
    o, final, varlen = mamba_chunk_scan_combined(**call, return_final_states=True, return_varlen_states=True)
    assert torch.equal(final, varlen[-1:])
    assert torch.equal(mamba_chunk_scan_combined(**call), o)


def step_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One step as Mamba-2's mixers call it: one number for each head, expanded over its channels."""
    inputs = {key: x.to(dtype) for key, x in scan_inputs(D="D", z="z", dt_bias="dt_bias").items()}
    wide = (BATCH, HEADS, WIDTH)
    return {
        **{key: inputs[key][:, 0] for key in ("x", "B", "C", "z")},
        "dt": inputs["dt"][:, 0, :, None].expand(wide),
        "A": inputs["A"][:, None, None].expand(HEADS, WIDTH, STATE),
        "D": inputs["D"][:, None].expand(HEADS, WIDTH),
        "dt_bias": inputs["dt_bias"][:, None].expand(HEADS, WIDTH),
        "dt_softplus": True,
    }


def step_reference(state: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    once = {key: inputs[key][:, None] for key in ("x", "B", "C", "z")}
    tied = {"dt": inputs["dt"][:, None, :, 0], "A": inputs["A"][:, 0, 0], "dt_bias": inputs["dt_bias"][:, 0]}
    o, state = reference(**once, **tied, D=inputs["D"], dt_softplus=True, initial_states=state)
    return o[:, 0], state


def test_step_in_place() -> None:
    state, inputs = torch.randn(BATCH, HEADS, WIDTH, STATE), step_inputs()
    o, expected = step_reference(state, **inputs)
    close(selective_state_update(state, **inputs), o)
    close(state, expected)


def test_step_in_a_pool() -> None:
    pool, inputs = torch.randn(5, HEADS, WIDTH, STATE), step_inputs()
    before = pool.clone()
    o, expected = step_reference(pool[[3, 0]], **inputs)
    close(selective_state_update(pool, **inputs, state_batch_indices=torch.tensor([3, 0])), o)
    close(pool[[3, 0]], expected)
    assert torch.equal(pool[[1, 2, 4]], before[[1, 2, 4]])
    selective_state_update(pool, **inputs, state_batch_indices=torch.tensor([-1, 2]))
    assert torch.equal(pool[[1, 4]], before[[1, 4]])


def test_step_gradients() -> None:
    torch.manual_seed(0)
    inputs = {"state": torch.randn(BATCH, HEADS, WIDTH, STATE, dtype=torch.float64), **step_inputs(torch.float64)}

    def ours(state: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        state = state * 1.0  # no leaf may change in place
        return selective_state_update(state, **retied(inputs)), state

    def truth(state: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        return step_reference(state, **retied(inputs))

    def retied(inputs: dict[str, Any]) -> dict[str, Any]:
        """Copies are not expanded any more."""
        tied = {key: inputs[key][..., :1].expand_as(inputs[key]) for key in ("dt", "dt_bias")}
        return inputs | tied | {"A": inputs["A"][:, :1, :1].expand_as(inputs["A"])}

    against_reference(inputs, ours, truth)


@pytest.mark.parametrize("name", ["dt", "A", "dt_bias"])
def test_step_refuses_what_differs_between_channels(name: str) -> None:
    inputs = step_inputs()
    inputs[name] = inputs[name].contiguous()
    with pytest.raises(NotImplementedError, match=rf"^{name} must be one number for each head"):
        selective_state_update(torch.zeros(BATCH, HEADS, WIDTH, STATE), **inputs)


def test_activations_keep_their_dtype() -> None:
    inputs = scan_inputs(**SOFTPLUS, D="D", z="z")
    half = {key: x.bfloat16() if key in ("x", "dt", "B", "C", "z") else x for key, x in inputs.items()}
    wide = {key: x.double() if isinstance(x, Tensor) else x for key, x in half.items()}
    o, state = mamba_chunk_scan_combined(**half, chunk_size=16, return_final_states=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    truth, _ = reference(**wide)
    rounded, _ = reference(**{key: x.bfloat16() if isinstance(x, Tensor) else x for key, x in half.items()})
    check({"o": o}, {"o": rounded}, {"o": truth}, torch.bfloat16)


WRONG = [
    pytest.param({"x": torch.zeros(2, 3, 4)}, r"x must be \[B, T, H, P\], got \(2, 3, 4\)", id="x-without-heads"),
    pytest.param({"dt": torch.zeros(2, 21, 1)}, r"dt must be \[B, T, H\] = \(2, 21, 4\)", id="dt-would-broadcast"),
    pytest.param({"A": torch.zeros(1)}, r"A must be \[H\] = \(4,\), got \(1,\)", id="A-would-broadcast"),
    pytest.param({"D": torch.zeros(4, 1)}, r"D must be \[H\] or \[H, P\] = \(4, 5\)", id="D-would-broadcast"),
    pytest.param({"z": torch.zeros(2, 21, 4)}, r"z must be \[B, T, H, P\]", id="z-without-channels"),
    pytest.param({"seq_idx": torch.zeros(21)}, r"seq_idx must be \[B, T\] = \(2, 21\)", id="seq_idx-without-rows"),
    pytest.param({"return_varlen_states": True}, "return_varlen_states needs cu_seqlens", id="states-of-no-sequences"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_scan_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mamba_chunk_scan_combined(**{**scan_inputs(), **change}, chunk_size=16)


def test_signatures_are_those_of_the_packages() -> None:
    """So that an import line is all that changes: the order of arguments is part of it."""
    import inspect

    wanted = {
        mamba_chunk_scan_combined: "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus "
        "dt_limit return_final_states return_varlen_states",
        selective_state_update: "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
        causal_conv1d_fn: "x weight bias seq_idx initial_states return_final_states final_states_out activation",
        causal_conv1d_update: "x conv_state weight bias activation cache_seqlens conv_state_indices",
    }
    for function, names in wanted.items():
        assert list(inspect.signature(function).parameters) == names.split()
