"""The mathematics of simple_gla: identities between forms and arguments, resuming, forgetting, and the pinned graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import fla_ops
from tests import numerics
from tests.cases import EXPORT, cases
from tests.contract.helpers import export, listing

FORMS = ("chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla", "parallel_simple_gla")
STATEFUL = FORMS[:3]
B, T, HK, H, K, V = 2, 37, 3, 6, 10, 7


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal, in float64: what is left over is the difference between two formulas."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(time: int = T, heads: int = H, key_heads: int = HK) -> dict[str, Tensor]:
    """q, k, v and g."""
    return {
        "q": draw(B, time, key_heads, K, seed=1),
        "k": draw(B, time, key_heads, K, seed=2) * K**-0.5,
        "v": draw(B, time, heads, V, seed=3),
        "g": -draw(B, time, heads, seed=4).abs(),
    }


def run(form: str, arguments: dict[str, Any]) -> list[Tensor]:
    """The outputs of a form that are not None; chunks of 16 steps where it has them."""
    if "chunk" in form:
        arguments = {"chunk_size": 16} | arguments
    return [y for y in getattr(fla_ops, form)(**arguments) if y is not None]


def with_gradients(form: str, arguments: dict[str, Any]) -> list[Tensor]:
    """Outputs, then the gradient of every floating input, of a sum with fixed weights."""
    given = {n: x.detach().requires_grad_() if isinstance(x, Tensor) else x for n, x in arguments.items()}
    outputs = run(form, given)
    weights = [draw(*y.shape, seed=9) for y in outputs]
    leaves = [x for x in given.values() if isinstance(x, Tensor)]
    return outputs + list(torch.autograd.grad(outputs, leaves, weights))


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    """The same, but for rounding."""
    for x, y in zip(found, expected, strict=True):
        numerics.close(x, y)


@pytest.mark.parametrize("form", FORMS[1:])
def test_forms_agree_with_the_chunk_form(form: str) -> None:
    assert_equal(with_gradients(form, inputs()), with_gradients("chunk_simple_gla", inputs()))


@pytest.mark.parametrize("mode", ["chunk", "fused_chunk", "fused_recurrent", "parallel"])
def test_dispatcher_runs_the_named_form(mode: str) -> None:
    found = fla_ops.simple_gla(**inputs(), chunk_size=16, mode=mode)
    assert torch.equal(found[0], run(f"{mode}_simple_gla", inputs())[0])
    assert found[1] is None


@pytest.mark.parametrize("form", STATEFUL[:2])
@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_chunk_size_does_not_change_the_result(form: str, size: int) -> None:
    arguments = inputs(time=70) | {"output_final_state": True}
    assert_equal(with_gradients(form, arguments | {"chunk_size": size}), with_gradients(form, arguments))


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_no_sequences(form: str) -> None:
    arguments = {name: x[:0] for name, x in inputs().items()}
    o, *gradients = with_gradients(form, arguments)
    assert o.shape == (0, T, H, V)
    assert [x.shape for x in gradients] == [x.shape for x in arguments.values()]


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("strength", [0.1, 1.7, 2.4])
def test_many_chunks_of_mild_and_of_strong_decay(form: str, strength: float) -> None:
    """A chunk may decay by exp(-38): the step after its end still sees what lies right before it."""
    time = 16 * 12 + 5
    arguments = inputs(time, H, H) | {"initial_state": draw(B, H, K, V)}
    arguments["g"] = torch.full((B, time, H), -strength, dtype=torch.float64)
    single = {n: x.float() for n, x in arguments.items()}
    found = with_gradients(form, single | {"output_final_state": True})
    expected = with_gradients("fused_recurrent_simple_gla", arguments | {"output_final_state": True})
    for x, y in zip(found, expected, strict=True):
        numerics.close(x, y, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_constant_decay_is_the_same_decay_at_every_step(form: str) -> None:
    bare = {n: x for n, x in inputs().items() if n != "g"}
    gamma = -draw(H).abs()
    *per_step, dg = with_gradients(form, bare | {"g": gamma.expand(B, T, H)})
    *constant, dgamma = with_gradients(form, bare | {"g_gamma": gamma})
    assert_equal([*constant, dgamma], [*per_step, dg.sum((0, 1))])


@pytest.mark.parametrize("form", FORMS)
def test_no_decay_is_a_decay_of_zero(form: str) -> None:
    bare = {n: x for n, x in inputs().items() if n != "g"}
    *zero, _ = with_gradients(form, bare | {"g": torch.zeros(B, T, H, dtype=torch.float64)})
    assert_equal(with_gradients(form, bare), zero)


@pytest.mark.parametrize("form", FORMS)
def test_heads_that_share_a_key_are_heads_with_equal_keys(form: str) -> None:
    shared, arguments = inputs(), inputs()
    arguments["q"], arguments["k"] = (shared[n].repeat_interleave(H // HK, 2) for n in ("q", "k"))
    o, dq, dk, dv, dg = with_gradients(form, arguments)
    groups = [x.unflatten(2, (HK, -1)).sum(3) for x in (dq, dk)]
    assert_equal(with_gradients(form, shared), [o, *groups, dv, dg])


@pytest.mark.parametrize("form", STATEFUL)
def test_value_first_states_are_transposed(form: str) -> None:
    state = draw(B, H, K, V)
    arguments = inputs() | {"output_final_state": True}
    o, final, *gradients, dstate = with_gradients(form, arguments | {"initial_state": state})
    value_first = arguments | {"initial_state": state.mT.contiguous(), "state_v_first": True}
    found = run(form, value_first)
    assert_equal(found, [o, final.mT])
    leaves = {n: x.requires_grad_() if isinstance(x, Tensor) else x for n, x in value_first.items()}
    o, final = run(form, leaves)
    weights = [draw(*o.shape, seed=9), draw(B, H, K, V, seed=9).mT]
    found = torch.autograd.grad([o, final], [x for x in leaves.values() if isinstance(x, Tensor)], weights)
    assert_equal(list(found), [*gradients, dstate.mT])


def test_reversed_time_is_time_backwards() -> None:
    arguments = inputs() | {"initial_state": draw(B, H, K, V), "output_final_state": True}
    flipped = {n: x.flip(1) if n in "qkvg" else x for n, x in arguments.items()}
    o, final = run("fused_recurrent_simple_gla", flipped)
    assert_equal(run("fused_recurrent_simple_gla", arguments | {"reverse": True}), [o.flip(1), final])


@pytest.mark.parametrize("form", FORMS)
def test_scale_is_a_factor_and_defaults_to_one_over_the_root_of_the_width(form: str) -> None:
    arguments = inputs()
    (o,) = run(form, arguments)
    assert_equal(run(form, arguments | {"scale": 1.0}), [o * K**0.5])


@pytest.mark.parametrize("form", FORMS)
def test_offsets_on_the_host_change_nothing(form: str) -> None:
    offsets = torch.tensor([0, 5, 5, T])
    packed = {n: x[:1] for n, x in inputs().items()} | {"cu_seqlens": offsets}
    (found,), (expected,) = run(form, packed | {"cu_seqlens_cpu": offsets}), run(form, packed)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("output_attentions", [True, False])
def test_attention_weights(output_attentions: bool) -> None:
    arguments = inputs()
    o, attn = fla_ops.parallel_simple_gla(**arguments, output_attentions=output_attentions)
    if not output_attentions:
        assert attn is None
        return
    assert attn.triu(1).count_nonzero() == 0
    numerics.close(torch.einsum("bhij,bjhv->bihv", attn, arguments["v"]), o)
    sums = arguments["g"].cumsum(1).mT
    queries, keys = (arguments[n].repeat_interleave(H // HK, 2) for n in ("q", "k"))
    scores = torch.einsum("bihk,bjhk->bhij", queries, keys) * K**-0.5
    numerics.close(attn, (scores * (sums[..., :, None] - sums[..., None, :]).exp()).tril())


@pytest.mark.parametrize("form", STATEFUL)
@pytest.mark.parametrize("split", [0, 1, 16, 20, T], ids=lambda n: f"after-{n}-steps")
def test_resuming_equals_not_having_stopped(form: str, split: int) -> None:
    """Gradients too: they flow back through the state from the second part into the first."""
    arguments = inputs() | {"initial_state": draw(B, H, K, V)}
    whole = with_gradients(form, arguments | {"output_final_state": True})

    leaves = {n: x.detach().requires_grad_() for n, x in arguments.items()}
    first = {n: x if n == "initial_state" else x[:, :split] for n, x in leaves.items()}
    o1, state = run(form, first | {"output_final_state": True})
    second = {n: state if n == "initial_state" else x[:, split:] for n, x in leaves.items()}
    o2, final = run(form, second | {"output_final_state": True})
    outputs = [torch.cat([o1, o2], 1), final]
    weights = [draw(*y.shape, seed=9) for y in outputs]
    assert_equal([*outputs, *torch.autograd.grad(outputs, list(leaves.values()), weights)], whole)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strong", [-1e4, float("-inf")], ids=["minus-10000", "minus-infinity"])
def test_a_strong_decay_forgets_exactly(form: str, strong: float) -> None:
    """What follows the step depends on nothing before it, forward and backward, and its own gate has no gradient."""
    step = 20
    arguments = inputs()
    arguments["g"][:, step] = strong
    after = {n: x[:, step:].clone() for n, x in arguments.items()}
    after["g"][:, 0] = 0.0
    (o,), (expected,) = run(form, arguments), run(form, after)
    numerics.close(o[:, step:], expected)

    leaves = {n: x.detach().requires_grad_() for n, x in arguments.items()}
    (o,) = run(form, leaves)
    dq, dk, dv, dg = torch.autograd.grad(o[:, step:].sum(), list(leaves.values()))
    assert all(x[:, :step].count_nonzero() == 0 for x in (dq, dk, dv))
    numerics.close(dg, dg.index_fill(1, torch.arange(step), 0.0))  # the rounding of a sum may be left
    assert dg[:, step].count_nonzero() == 0
    assert all(x.isfinite().all() for x in (dq, dk, dv, dg))


@pytest.mark.parametrize("form", STATEFUL)
def test_state_of_an_empty_sequence_passes_through(form: str) -> None:
    packed = {n: x[:1] for n, x in inputs().items()}
    state = draw(3, H, K, V).requires_grad_()
    cu_seqlens = torch.tensor([0, 5, 5, T])
    _, final = run(form, packed | {"cu_seqlens": cu_seqlens, "initial_state": state, "output_final_state": True})
    assert torch.equal(final[1], state[1])
    (dstate,) = torch.autograd.grad(final.sum(), state)
    assert torch.equal(dstate[1], torch.ones_like(dstate[1]))


@pytest.mark.parametrize("form", FORMS)
def test_float16_does_not_overflow_inside(form: str) -> None:
    """The read-out of a long sum is in float32: only an output too large for float16 may be infinite."""
    time = 64
    q, k = (torch.full((1, time, 1, 16), 40.0, dtype=torch.float16) for _ in range(2))
    v = torch.full((1, time, 1, 2), 2.0, dtype=torch.float16)
    (o,) = run(form, {"q": q, "k": k, "v": v, "scale": 1e-3})
    expected = 2.0 * 16 * 40 * 40 * 1e-3 * torch.arange(1.0, time + 1)
    numerics.close(o[0, :, 0, 0].float(), expected, torch.float16)


def test_exported_graph() -> None:
    (case,) = cases("chunk_simple_gla", EXPORT)
    assert_expected_inline(
        listing(export(case)),
        """\
x_q
x_k
x_v
x_g
x_initial_state
chunk_simple_gla = fla.chunk_simple_gla(x_q, x_k, x_v, x_g, None, 0.3, x_initial_state, True, False, None, None, 16)
getitem = getitem(chunk_simple_gla, 0)
getitem_1 = getitem(chunk_simple_gla, 1)
output = output((getitem, getitem_1))""",
    )
