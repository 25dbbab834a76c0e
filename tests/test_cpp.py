"""The C++ kernels of a CPU: where their chunks, windows, threads and dtypes meet, and what serves without them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fla_ops
from fla_ops.common.cpu import build
from tests import numerics
from tests.cases import COMBINATION, Case, cases
from tests.contract import test_numbers
from tests.contract.helpers import INTERPRETED, with_slow

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter serves the CPU")

SOURCES = (
    "simple_gla/cpu/chunk.cpp",
    "simple_gla/cpu/recurrent.cpp",
    "gated_delta_rule/cpu/chunk.cpp",
    "gated_delta_rule/cpu/recurrent.cpp",
    "linear_attn/cpu/normalize.cpp",
    "attn/cpu/decoding.cpp",
    "gsa/cpu/chunk.cpp",
    "gsa/cpu/chunk_backward.cpp",
    "gsa/cpu/recurrent.cpp",
    "causal_conv/cpu/convolve.cpp",
)
SLOT_FORMS = ("chunk_gsa", "fused_recurrent_gsa")
CHUNKED = ("chunk_simple_gla", "fused_chunk_simple_gla")
SERVED = (
    *CHUNKED,
    "fused_recurrent_simple_gla",
    "simple_gla_step_",
    "simple_gla_prefill_",
    "simple_gla_advance_",
    "simple_gla_states",
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "gated_delta_rule_step_",
    "normalize_output",
    "linear_attn_step_",
    "attn_decoding_one_step",
    "chunk_gsa",
    "gsa_step_",
    "fused_recurrent_gsa",
    "causal_conv",
    "causal_conv_step_",
)
SCENARIOS = [case for name in SERVED for case in cases(name) if COMBINATION not in case.tags]


@pytest.fixture
def without_kernels() -> Iterator[None]:
    """As where they do not compile."""
    with mock.patch.object(build, "library", return_value=None):
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(
    time: int, heads: tuple[int, int] = (2, 2), widths: tuple[int, int] = (24, 40), batch: int = 2
) -> dict[str, Tensor]:
    """q, k, v and g, in float32; heads are HK and H, widths K and V."""
    (key_heads, value_heads), (key, value) = heads, widths
    return {
        "q": draw(batch, time, key_heads, key, seed=1),
        "k": draw(batch, time, key_heads, key, seed=2) * key**-0.5,
        "v": draw(batch, time, value_heads, value, seed=3),
        "g": -draw(batch, time, value_heads, seed=4).abs() / 8,
    }


def with_gradients(form: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, then the gradient of every floating input, of a sum with fixed weights."""
    given = {
        name: x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    outputs = dict(zip(("o", "state"), getattr(fla_ops, form)(**given, output_final_state=True), strict=True))
    leaves = {f"d{name}": x for name, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    weights = [draw(*y.shape, seed=9).to(y.dtype) for y in outputs.values()]
    return outputs | dict(
        zip(leaves, torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights), strict=True)
    )


def check(form: str, arguments: dict[str, Any]) -> None:
    """float32, in C++, against float64, in ATen."""
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in arguments.items()}
    found, truth = with_gradients(form, arguments), with_gradients(form, wide)
    for name, x in found.items():
        numerics.close(x.double(), truth[name], torch.float32)


@pytest.mark.parametrize("source", SOURCES)
def test_it_compiles_here_without_a_warning(source: str, recwarn: pytest.WarningsRecorder) -> None:
    assert build.library(source) is not None
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("given", [("g",), ("g_gamma",), ()], ids=["per-step", "constant", "none"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("form", CHUNKED)
def test_windows_go_on_from_each_other(form: str, packed: bool, given: tuple[str, ...]) -> None:
    """More chunks than the fused form's backward pass holds at once; sequences of none, one, and several windows."""
    arguments: dict[str, Any] = inputs(time=16 * 8 * 2 + 5, batch=1 if packed else 2) | {"chunk_size": 16}
    decays = {"g": arguments.pop("g"), "g_gamma": -draw(2, seed=5).abs() / 8}
    arguments |= {name: decays[name] for name in given}
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, 0, 1, 130, 261])
    sequences = 4 if packed else 2
    check(form, arguments | {"initial_state": draw(sequences, 2, 24, 40, seed=6)})


@pytest.mark.parametrize(
    ("heads", "widths"),
    [
        ((1, 1), (256, 256)),
        ((9, 9), (8, 24)),
        ((5, 10), (16, 130)),
        ((1, 3), (16, 16)),
        ((2, 4), (5, 33)),
        ((3, 3), (1, 1)),
        ((1, 2), (144, 17)),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", [*CHUNKED, "fused_recurrent_simple_gla"])
def test_any_heads_and_widths(form: str, heads: tuple[int, int], widths: tuple[int, int]) -> None:
    check(form, inputs(70, heads, widths))


@pytest.mark.parametrize("time", [1, 15, 16, 17, 63, 64, 65, 128, 130])
@pytest.mark.parametrize("form", CHUNKED)
def test_lengths_around_a_chunk(form: str, time: int) -> None:
    check(form, inputs(time) | {"initial_state": draw(2, 2, 24, 40, seed=6)})


@pytest.mark.parametrize("form", CHUNKED)
def test_decays_that_grow_back(form: str) -> None:
    """A positive log decay undoes a negative one, further down than float32 holds a decay to be zero."""
    arguments = inputs(70)
    arguments["g"] = torch.tensor([-30.0, 30.0]).repeat(35)[:, None].expand(2, 70, 2).contiguous() / 2
    check(form, arguments)


@pytest.mark.parametrize("form", [*CHUNKED, "fused_recurrent_simple_gla"])
def test_the_number_of_threads_does_not_change_a_bit(form: str) -> None:
    arguments = inputs(300, widths=(64, 64))
    assert arguments["v"].numel() * 64 >= build.TOGETHER
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(form, arguments))
    finally:
        torch.set_num_threads(before)
    for a, b in pairwise(results):
        assert all(torch.equal(a[name], b[name]) for name in a)


def slot_inputs(
    time: int, heads: tuple[int, int] = (4, 2), widths: tuple[int, int, int] = (24, 40, 20), batch: int = 2
) -> dict[str, Tensor]:
    """q, k, v, s and g of gsa, in float32; heads are HQ and H, widths K, V and M."""
    (query_heads, state_heads), (key, value, slots) = heads, widths
    return {
        "q": draw(batch, time, query_heads, key, seed=1),
        "k": draw(batch, time, state_heads, key, seed=2) * key**-0.5,
        "v": draw(batch, time, state_heads, value, seed=3),
        "s": draw(batch, time, state_heads, slots, seed=4),
        "g": -draw(batch, time, state_heads, slots, seed=5).abs() / 8,
    }


def slot_states(arguments: dict[str, Any], sequences: int) -> tuple[Tensor, Tensor]:
    """Both initial states."""
    (heads, value), key, slots = arguments["v"].shape[2:], arguments["k"].shape[3], arguments["s"].shape[3]
    return draw(sequences, heads, key, slots, seed=6), draw(sequences, heads, slots, value, seed=7)


def with_slot_gradients(
    form: str, arguments: dict[str, Any], pair: tuple[Tensor, Tensor], **options: Any
) -> list[Tensor]:
    """Outputs, final states, then the gradient of every floating input, of a sum with fixed weights."""
    given = {
        name: x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    state = tuple(x.detach().requires_grad_() for x in pair)
    o, final = getattr(fla_ops, form)(**given, initial_state=state, output_final_state=True, **options)
    leaves = [x for x in (*given.values(), *state) if isinstance(x, Tensor) and x.requires_grad]
    outputs = [o, *final]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [draw(*y.shape, seed=9).to(y.dtype) for y in outputs])]


def check_slots(form: str, arguments: dict[str, Any], sequences: int = 2, **options: Any) -> None:
    """float32, in C++, against float64, in ATen."""
    pair = slot_states(arguments, sequences)
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in arguments.items()}
    truth = with_slot_gradients(form, wide, (pair[0].double(), pair[1].double()), **options)
    for x, y in zip(with_slot_gradients(form, arguments, pair, **options), truth, strict=True):
        numerics.close(x.double(), y, torch.float32)


@pytest.mark.parametrize(
    ("heads", "widths"),
    [((1, 1), (64, 64, 64)), ((6, 2), (1, 40, 33)), ((3, 3), (17, 130, 1)), ((2, 1), (33, 5, 144))],
    ids=str,
)
@pytest.mark.parametrize("form", SLOT_FORMS)
def test_slots_of_any_heads_and_widths(form: str, heads: tuple[int, int], widths: tuple[int, int, int]) -> None:
    check_slots(form, slot_inputs(70, heads, widths))


@pytest.mark.parametrize("time", [1, 15, 16, 17, 31, 32, 33, 48, 65])
@pytest.mark.parametrize("chunk_size", [16, 32])
def test_lengths_around_a_block_and_a_chunk_of_slots(time: int, chunk_size: int) -> None:
    check_slots("chunk_gsa", slot_inputs(time), chunk_size=chunk_size)


@pytest.mark.parametrize("gated", [True, False], ids=["gates", "no-gates"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_windows_of_slots_go_on_from_each_other(packed: bool, gated: bool) -> None:
    """More chunks than the backward pass holds at once; sequences of none, one, and several windows."""
    arguments: dict[str, Any] = slot_inputs(time=16 * 8 * 2 + 5, batch=1 if packed else 2)
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, 0, 1, 130, 261])
    if not gated:
        del arguments["g"]
    check_slots("chunk_gsa", arguments, 4 if packed else 2, chunk_size=16)


@pytest.mark.parametrize("level", [0, 1])
def test_what_is_kept_for_slots_gives_the_same_bits(level: int) -> None:
    """Over several windows, with queries in groups, in chunks of several blocks."""
    arguments = slot_inputs(300)
    pair = slot_states(arguments, 2)
    expected = with_slot_gradients("chunk_gsa", arguments, pair)
    found = with_slot_gradients("chunk_gsa", arguments, pair, checkpoint_level=level)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", SLOT_FORMS)
def test_slots_that_forget_and_grow_back(form: str) -> None:
    """Factors of exp(-30) and exp(30) in turn, slot by slot; a slot that a gate of -inf empties in the middle."""
    arguments = slot_inputs(70)
    arguments["g"][..., ::2] = torch.tensor([-15.0, 15.0]).repeat(35)[:, None, None]
    arguments["g"][:, 20:22, 0, 3] = float("-inf")
    arguments["g"][:, 40, :, :7] = -1e4
    check_slots(form, arguments)


@pytest.mark.parametrize("form", SLOT_FORMS)
def test_the_number_of_threads_does_not_change_a_bit_of_slots(form: str) -> None:
    arguments = slot_inputs(150, widths=(32, 32, 32))
    assert arguments["s"].numel() * 64 >= build.TOGETHER
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_slot_gradients(form, arguments, slot_states(arguments, 2)))
    finally:
        torch.set_num_threads(before)
    for a, b in pairwise(results):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("slots", [1, 33, 144])
@pytest.mark.parametrize(("heads", "widths"), [((1, 1), (256, 5)), ((6, 2), (1, 40)), ((3, 3), (17, 130))], ids=str)
def test_a_step_of_slots_with_any_heads_and_widths(heads: tuple[int, int], widths: tuple[int, int], slots: int) -> None:
    """Rows past the last four, columns past the last vector, groups that read what the first query left."""
    arguments = {n: x[:, 0] for n, x in slot_inputs(1, heads, (*widths, slots), batch=3).items()}
    pools = draw(3, heads[1], widths[0], slots, seed=6), draw(3, heads[1], slots, widths[1], seed=7)
    narrow, wide = (tuple(x.to(dtype, copy=True) for x in pools) for dtype in (torch.float32, torch.float64))
    o = fla_ops.gsa_step_(**arguments, state_k=narrow[0], state_v=narrow[1])
    truth = fla_ops.gsa_step_(**{n: x.double() for n, x in arguments.items()}, state_k=wide[0], state_v=wide[1])
    for x, y in zip((o, *narrow), (truth, *wide), strict=True):
        numerics.close(x.double(), y, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [*CHUNKED, "fused_recurrent_simple_gla", "fused_recurrent_gsa"])
def test_half_precision_is_rounded_once(form: str, dtype: torch.dtype) -> None:
    given = slot_inputs(70) if form == "fused_recurrent_gsa" else inputs(70)
    arguments = {name: x.to(dtype) for name, x in given.items()}
    half, _ = getattr(fla_ops, form)(**arguments)
    single, _ = getattr(fla_ops, form)(**{name: x.float() for name, x in arguments.items()})
    assert torch.equal(half, single.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_infinity_and_nan_pass_through_half_precision(dtype: torch.dtype) -> None:
    arguments = {name: x.to(dtype) for name, x in inputs(20).items()}
    arguments["v"][0, 3, 0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    o, _ = fla_ops.fused_recurrent_simple_gla(**arguments)
    expected, _ = fla_ops.fused_recurrent_simple_gla(**{name: x.float() for name, x in arguments.items()})
    assert torch.equal(o.isnan(), expected.isnan())
    assert torch.equal(o.isinf(), expected.isinf())
    assert o.isnan().any()


def decoding(heads: tuple[int, int] = (2, 6), widths: tuple[int, int] = (24, 40)) -> dict[str, Any]:
    """Caches of no key, one, and around one part and several."""
    offsets = torch.tensor([0, 0, 1, 17, 273, 530, 1200])
    (key_heads, heads_of_q), (key, value) = heads, widths
    return {
        "q": draw(1, len(offsets) - 1, heads_of_q, key, seed=1),
        "k": draw(1, 1200, key_heads, key, seed=2),
        "v": draw(1, 1200, key_heads, value, seed=3),
        "g": -draw(1, 1200, heads_of_q, seed=4).abs() / 64,
        "cu_seqlens": offsets,
        "do_gate_scale": True,
        "sink_bias": draw(heads_of_q, seed=5),
    }


def check_decoding(arguments: dict[str, Any]) -> None:
    """float32, in C++, against float64, in ATen."""
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in arguments.items()}
    o, truth = (fla_ops.attn_decoding_one_step(**given) for given in (arguments, wide))
    numerics.close(o.double(), truth, torch.float32)


@pytest.mark.parametrize("window_size", [None, 0, 1, 256, 300])
@pytest.mark.parametrize(("heads", "widths"), [((2, 6), (24, 40)), ((3, 3), (1, 130)), ((1, 17), (33, 5))], ids=str)
def test_decoding_with_any_heads_widths_and_windows(
    heads: tuple[int, int], widths: tuple[int, int], window_size: int | None
) -> None:
    check_decoding(decoding(heads, widths) | {"window_size": window_size})


def test_decoding_past_gates_that_forget() -> None:
    arguments = decoding()
    arguments["g"][0, [100, 290, 600, 1199]] = float("-inf")
    check_decoding(arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_cache_has_the_same_bits_in_company_and_with_any_threads(dtype: torch.dtype) -> None:
    arguments = {n: x.to(dtype) if n in ("q", "k", "v") else x for n, x in decoding().items()}
    assert build.TOGETHER <= 1200 * 6 * (24 + 40)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fla_ops.attn_decoding_one_step(**arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in pairwise(results))
    for n, (start, end) in enumerate(pairwise(arguments["cu_seqlens"].tolist())):
        own = {name: arguments[name][:, start:end] for name in ("k", "v", "g")}
        own |= {"q": arguments["q"][:, n : n + 1], "cu_seqlens": torch.tensor([0, end - start])}
        assert torch.equal(fla_ops.attn_decoding_one_step(**arguments | own), results[0][:, n : n + 1])


def test_decoding_keeps_a_nan_in_its_cache() -> None:
    arguments = decoding()
    clean = fla_ops.attn_decoding_one_step(**arguments)
    arguments["k"][0, 300], arguments["v"][0, 301] = float("nan"), float("inf")
    found = fla_ops.attn_decoding_one_step(**arguments)
    others = [0, 1, 2, 3, 5]
    assert torch.equal(found[:, others], clean[:, others])
    assert found[:, 4].isnan().all()


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_lesser_machines(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for a machine with narrower vectors, where this one can run it."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", capability):
        pytest.skip(f"not a machine that runs code for {capability}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(build, "_load", cache(build._load.__wrapped__))
    for form in (*CHUNKED, "fused_recurrent_simple_gla"):
        check(form, inputs(70, (1, 3)))
    for form in SLOT_FORMS:
        check_slots(form, slot_inputs(70))
    check_decoding(decoding())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", with_slow(SCENARIOS, lambda case: bool(case.tags)))
@pytest.mark.usefixtures("without_kernels")
def test_aten_serves_without_them(case: Case, dtype: torch.dtype) -> None:
    test_numbers.check_numbers(case, "cpu", dtype)
