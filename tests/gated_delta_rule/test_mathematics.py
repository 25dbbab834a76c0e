"""The gated delta rule beyond the contract: what it means, its forms against each other, chunks, threads, the tree."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fla_ops
from fla_ops.common.cpu import build, sequences
from fla_ops.gated_delta_rule import reference
from fla_ops.gated_delta_rule.cpu import scan
from tests import numerics
from tests.contract.helpers import DEVICES, INTERPRETED

FORMS = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(
    time: int, heads: tuple[int, int] = (2, 4), widths: tuple[int, int] = (24, 40), batch: int = 2, states: int = 2
) -> dict[str, Any]:
    """A call with a state; heads are HK and H, widths K and V."""
    (key_heads, value_heads), (key, value) = heads, widths
    return {
        "q": draw(batch, time, key_heads, key, seed=1),
        "k": draw(batch, time, key_heads, key, seed=2),
        "v": draw(batch, time, value_heads, value, seed=3),
        "g": -draw(batch, time, value_heads, seed=4).abs() / 8,
        "beta": draw(batch, time, value_heads, seed=5).sigmoid(),
        "initial_state": draw(states, value_heads, key, value, seed=6),
        "use_qk_l2norm_in_kernel": True,
    }


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in arguments.items()}


def with_gradients(function: Any, arguments: dict[str, Any], **flags: Any) -> dict[str, Tensor]:
    """Outputs, then the gradient of every floating input, of a sum with fixed weights."""
    leaves = {n: x.detach().requires_grad_() for n, x in arguments.items() if n in NAMES and x is not None}
    outputs = dict(zip(("o", "state"), function(**(arguments | leaves), **flags), strict=True))
    weights = [draw(*y.shape, seed=9).to(y.dtype) for y in outputs.values()]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    return outputs | {f"d{name}": x for name, x in zip(leaves, found, strict=True)}


def check(form: str, arguments: dict[str, Any], **flags: Any) -> None:
    """A form in float32 against the reference in float64."""
    found = with_gradients(getattr(fla_ops, form), arguments, output_final_state=True, **flags)
    truth = with_gradients(reference.recurrent, widened(arguments))
    narrow = with_gradients(reference.recurrent, arguments)
    numerics.check(found, narrow, truth, torch.float32)


@pytest.mark.parametrize(
    ("heads", "widths"), [((1, 1), (128, 128)), ((1, 3), (16, 16)), ((2, 4), (5, 33)), ((3, 3), (1, 1))], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_any_heads_and_widths(form: str, heads: tuple[int, int], widths: tuple[int, int]) -> None:
    check(form, inputs(70, heads, widths))


@pytest.mark.parametrize("time", [15, 16, 17, 63, 64, 65, 130])
def test_lengths_around_a_chunk(time: int) -> None:
    check("chunk_gated_delta_rule", inputs(time))


@pytest.mark.parametrize("form", FORMS)
def test_a_thousand_steps_with_little_decay(form: str) -> None:
    arguments = inputs(1000, (1, 1), (16, 16), batch=1, states=1)
    check(form, arguments | {"g": arguments["g"] / 100, "beta": 2 * arguments["beta"]})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_full_strength_stores_the_value(form: str, device: str) -> None:
    """With unit keys and beta = 1, what the state says about the last key is its value."""
    arguments = inputs(70, heads=(4, 4)) | {"beta": torch.ones(2, 70, 4)}
    arguments |= {"q": arguments["k"], "scale": 1.0}
    arguments = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in arguments.items()}
    o, _ = getattr(fla_ops, form)(**arguments)
    numerics.close(o, arguments["v"])


@pytest.mark.parametrize("form", FORMS)
def test_no_gate_is_a_gate_of_zeros(form: str) -> None:
    arguments, function = inputs(40), getattr(fla_ops, form)
    zeros = arguments | {"g": torch.zeros_like(arguments["g"])}
    assert torch.equal(function(**(arguments | {"g": None}))[0], function(**zeros)[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_run_in_two_parts_is_one_run(form: str) -> None:
    arguments, function = inputs(90), getattr(fla_ops, form)
    steps = ("q", "k", "v", "g", "beta")
    first, last = (arguments | {n: arguments[n][:, part] for n in steps} for part in (slice(37), slice(37, None)))
    o, state = function(**first, output_final_state=True)
    more, final = function(**(last | {"initial_state": state}), output_final_state=True)
    whole, expected = function(**arguments, output_final_state=True)
    numerics.close(torch.cat([o, more], 1), whole)
    numerics.close(final, expected)


def test_the_chunk_size_changes_rounding_alone() -> None:
    arguments = inputs(200)
    results = [fla_ops.chunk_gated_delta_rule(**arguments, chunk_size=n)[0] for n in (16, 32, 64, 256)]
    for a, b in pairwise(results):
        numerics.close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twenty_steps_equal_the_recurrence(dtype: torch.dtype) -> None:
    arguments = {n: x.to(dtype) if n in ("q", "k", "v") else x for n, x in inputs(20).items()}
    pool = arguments["initial_state"].clone()
    steps, flags = ("q", "k", "v"), {"use_qk_l2norm_in_kernel": True}
    o = torch.stack(
        [
            fla_ops.gated_delta_rule_step_(
                *(arguments[n][:, t] for n in steps), pool, arguments["g"][:, t], arguments["beta"][:, t], **flags
            )
            for t in range(20)
        ],
        1,
    )
    expected, final = fla_ops.fused_recurrent_gated_delta_rule(**arguments, output_final_state=True)
    numerics.close(o, expected)
    numerics.close(pool, final)


def test_value_first_is_the_view_of_such_a_pool() -> None:
    q, k, v, g, beta = (inputs(1)[n][:, 0] for n in ("q", "k", "v", "g", "beta"))
    pool = draw(2, 4, 40, 24, seed=7)
    view = pool.clone().mT
    o = fla_ops.gated_delta_rule_step_(q, k, v, pool, g, beta, state_v_first=True)
    assert torch.equal(o, fla_ops.gated_delta_rule_step_(q, k, v, view, g, beta))
    assert torch.equal(pool, view.mT)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter serves the CPU")
@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_threads_does_not_change_a_bit(form: str) -> None:
    arguments = inputs(300, widths=(64, 64))
    assert arguments["v"].numel() * 64 >= build.TOGETHER
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(getattr(fla_ops, form), arguments, output_final_state=True))
    finally:
        torch.set_num_threads(before)
    for a, b in pairwise(results):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter serves the CPU")
@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_lesser_machines(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for a machine with narrower vectors, where this one can run it."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", capability):
        pytest.skip(f"not a machine that runs code for {capability}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(build, "_load", cache(build._load.__wrapped__))
    for form in FORMS:
        check(form, inputs(70, (1, 3)))


@pytest.mark.parametrize("offsets", [None, [0, 0, 33, 34, 450]], ids=["dense", "packed-with-empty-and-single"])
@pytest.mark.parametrize("resets", [False, True], ids=["fades", "resets"])
def test_the_tree_of_traced_code_is_the_walk(resets: bool, offsets: list[int] | None) -> None:
    """Over two levels of blocks of chunks, forward and backward, in float64."""
    time = 450
    arguments = inputs(time, batch=1 if offsets else 2, states=4 if offsets else 2)
    if resets:
        arguments["g"][:, 3::7], arguments["g"][:, 5::11] = -torch.inf, -1e4
    arguments = widened(arguments) | {"chunk_size": 16, "output_final_state": True}
    if offsets:
        arguments["cu_seqlens"] = torch.tensor(offsets)
    expected = with_gradients(fla_ops.chunk_gated_delta_rule, arguments)
    traced = mock.Mock(return_value=True)
    with mock.patch.object(scan, "is_traced", traced), mock.patch.object(sequences, "is_traced", traced):
        found = with_gradients(fla_ops.chunk_gated_delta_rule, arguments)
    assert traced.called
    for name, x in found.items():
        numerics.close(x, expected[name])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_compiled_bodies_give_the_operators_numbers() -> None:
    arguments = inputs(150)
    expected = with_gradients(fla_ops.chunk_gated_delta_rule, arguments, output_final_state=True)

    def layer(**given: Any) -> Any:
        return fla_ops.chunk_gated_delta_rule(**given)

    with fla_ops.inlining():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        found = with_gradients(compiled, arguments, output_final_state=True)
    for name, x in found.items():
        numerics.close(x, expected[name], torch.float32)
