"""The mathematics of gsa: full-size gradients, decoding, resuming, checkpoint levels and what each of them keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import fla_ops
from fla_ops.gsa import reference
from tests import numerics
from tests.cases import EXPORT, cases
from tests.contract.helpers import Recorder, export, listing

FORMS = ("chunk_gsa", "fused_recurrent_gsa")
SIZES = {"B": 2, "T": 70, "HQ": 6, "H": 3, "K": 10, "V": 7, "M": 5}
FULL = {"B": 2, "T": 512, "HQ": 8, "H": 2, "K": 64, "V": 48, "M": 32}


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal, in float64: what is left over is the difference between two formulas."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(sizes: dict[str, int], gated: bool = True) -> dict[str, Tensor]:
    """q, k, v, s, and g if gated."""
    b, t, query_heads, h, k, v, m = sizes.values()
    found = {
        "q": draw(b, t, query_heads, k, seed=1),
        "k": draw(b, t, h, k, seed=2) * k**-0.5,
        "v": draw(b, t, h, v, seed=3),
        "s": draw(b, t, h, m, seed=4),
    }
    return found | ({"g": -draw(b, t, h, m, seed=5).abs() / 4} if gated else {})


def states(sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Initial states."""
    b, _, _, h, k, v, m = sizes.values()
    return draw(b, h, k, m, seed=6), draw(b, h, m, v, seed=7)


def gradients(function: Any, arguments: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Outputs, final states and the gradient of everything, for fixed random gradients that arrive."""
    trained = [x.clone().requires_grad_() for x in (*arguments.values(), *pair)]
    given = dict(zip(arguments, trained, strict=False))
    o, final_k, final_v = function(given, (trained[-2], trained[-1]))
    outputs = (o, final_k, final_v)
    arriving = [draw(*y.shape, seed=8) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, trained, arriving)]


def by_reference(given: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return reference.recurrent(**given, initial_k=pair[0], initial_v=pair[1])


def by_form(form: str, **options: Any) -> Any:
    def run(given: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        o, final = getattr(fla_ops, form)(**given, initial_state=pair, output_final_state=True, **options)
        return o, *final

    return run


@pytest.mark.slow
@pytest.mark.parametrize("gated", [True, False], ids=["gates", "no-gates"])
def test_gradients_at_full_size(gated: bool) -> None:
    """Eight chunks, groups of four query heads, widths that differ: outputs and all gradients, to 1e-9."""
    arguments, pair = inputs(FULL, gated), states(FULL)
    expected = gradients(by_reference, arguments, pair)
    for form in FORMS:
        for x, y in zip(gradients(by_form(form), arguments, pair), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gated", [True, False], ids=["gates", "no-gates"])
def test_gates_that_are_the_same_for_all_slots_give_two_simple_gla(gated: bool) -> None:
    """With one gate for all slots, each pass is simple_gla; without any, ABC's gates are those of its definition."""
    arguments = inputs(SIZES | {"HQ": 3}, gated)
    if gated:
        arguments["g"] = arguments["g"][..., :1].expand_as(arguments["s"])
        q, k, v, s, g = arguments.values()
        x, _ = fla_ops.chunk_simple_gla(q, k, s, g[..., 0])
        expected, _ = fla_ops.chunk_simple_gla(x.softmax(-1), s, v, g[..., 0], scale=1.0)
    else:
        expected, _ = fla_ops.chunk_gsa(*list(arguments.values())[:3], *reference.abc_gates(arguments["s"]))
    for form in FORMS:
        o, _ = getattr(fla_ops, form)(**arguments)
        numerics.close(o, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [1, 32, 43], ids=lambda cut: f"after-{cut}-steps")
def test_resuming_equals_not_having_stopped(form: str, cut: int) -> None:
    arguments, pair, run = inputs(SIZES), states(SIZES), by_form(form)

    def in_two(given: dict[str, Tensor], start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        first, *middle = run({name: x[:, :cut] for name, x in given.items()}, start)
        second, *final = run({name: x[:, cut:] for name, x in given.items()}, tuple(middle))
        return torch.cat([first, second], 1), *final

    for x, y in zip(gradients(in_two, arguments, pair), gradients(run, arguments, pair), strict=True):
        numerics.close(x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_two_hundred_steps_equal_the_prefill(dtype: torch.dtype) -> None:
    sizes = SIZES | {"T": 200}
    arguments = {name: x.to(dtype) for name, x in inputs(sizes).items()}
    pools = tuple(x.to(dtype) for x in states(sizes))
    o, final = fla_ops.chunk_gsa(**arguments, initial_state=pools, output_final_state=True)
    pools = tuple(x.clone() for x in pools)
    steps = [fla_ops.gsa_step_(*(x[:, t] for x in arguments.values()), *pools) for t in range(sizes["T"])]
    for x, y in zip((torch.stack(steps, 1), *pools), (o, *final), strict=True):
        numerics.close(x, y)


def kept_bytes(level: int, arguments: dict[str, Tensor]) -> int:
    """Memory that a gradient holds on to beside the inputs."""
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.data_ptr()] = x.numel() * x.element_size()
        return x

    given = {name: x.clone().requires_grad_() for name, x in arguments.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fla_ops.chunk_gsa(**given, checkpoint_level=level)
    return sum(size for pointer, size in found.items() if pointer not in {x.data_ptr() for x in given.values()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gates", "no-gates"])
def test_checkpoint_levels_give_the_same_bits(dtype: torch.dtype, gated: bool) -> None:
    arguments = {name: x.to(dtype) for name, x in inputs(SIZES, gated).items()}
    found = []
    for level in (0, 1, 2):
        given = {name: x.clone().requires_grad_() for name, x in arguments.items()}
        o, _ = fla_ops.chunk_gsa(**given, checkpoint_level=level)
        found.append([o, *torch.autograd.grad(o, list(given.values()), draw(*o.shape).to(dtype))])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_checkpoint_levels_keep_less_and_less() -> None:
    """Beside the inputs, level 2 keeps nothing, level 1 the argument of the softmax, level 0 the states too."""
    arguments = {name: x.float() for name, x in inputs(SIZES).items()}
    b, t, query_heads, h, k, v, m = SIZES.values()
    argument = b * t * query_heads * (m + 1) * 4
    chunk_states = b * -(-t // 32) * h * (k + v) * m * 4
    assert [kept_bytes(level, arguments) for level in (2, 1, 0)] == [0, argument, argument + chunk_states]


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    """Without one, level 0 costs no memory: the operator below is asked for nothing."""
    with Recorder() as recorder:
        fla_ops.chunk_gsa(**inputs(SIZES), checkpoint_level=0)
    (call,) = recorder.calls
    assert call.outputs[3:] == (None,) * 4


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_no_sequences(form: str) -> None:
    arguments = {name: x[:0] for name, x in inputs(SIZES).items()}
    first, second = states(SIZES)
    results = gradients(by_form(form), arguments, (first[:0], second[:0]))
    assert all(0 in x.shape for x in results)


@pytest.mark.parametrize("strength", [-1e4, float("-inf")], ids=str)
def test_a_slot_that_forgets_is_empty(strength: float) -> None:
    """The output after a gate of -inf in every slot is that of a run that starts there."""
    arguments, pair, cut = inputs(SIZES), states(SIZES), 20
    arguments["g"][:, cut] = strength
    later = {name: x[:, cut:] for name, x in arguments.items()}
    for form in FORMS:
        o, final = getattr(fla_ops, form)(**arguments, initial_state=pair, output_final_state=True)
        expected, expected_final = getattr(fla_ops, form)(**later, output_final_state=True)
        for x, y in zip((o[:, cut:], *final), (expected, *expected_final), strict=True):
            numerics.close(x, y)


def test_exported_graph() -> None:
    """The operator is one call; decomposed, it is the one that also returns what a gradient would keep."""
    (case,) = cases("chunk_gsa", EXPORT)
    program = export(case)
    assert_expected_inline(
        listing(program),
        """\
x_q
x_k
x_v
x_s
x_g
x_initial_k
x_initial_v
chunk_gsa = fla.chunk_gsa(x_q, x_k, x_v, x_s, x_g, 0.3, x_initial_k, x_initial_v, True, 2, None, None, 16)
getitem = getitem(chunk_gsa, 0)
getitem_1 = getitem(chunk_gsa, 1)
getitem_2 = getitem(chunk_gsa, 2)
output = output((getitem, getitem_1, getitem_2))""",
    )
    assert_expected_inline(
        listing(program.run_decompositions()),
        """\
x_q
x_k
x_v
x_s
x_g
x_initial_k
x_initial_v
chunk_gsa_forward = fla.chunk_gsa_forward(x_q, x_k, x_v, x_s, x_g, 0.3, x_initial_k, x_initial_v, True, None, None, 16)
getitem = getitem(chunk_gsa_forward, 0)
getitem_1 = getitem(chunk_gsa_forward, 1)
getitem_2 = getitem(chunk_gsa_forward, 2)
output = output((getitem, getitem_1, getitem_2))""",
    )
