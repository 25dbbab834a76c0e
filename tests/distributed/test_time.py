"""Sequence parallelism: pieces of every kind, both exchanges, bytes that do not grow, and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fla_ops
from fla_ops.distributed import exchange
from fla_ops.simple_gla import forms
from fla_ops.simple_gla.call import Call
from tests.distributed import comparing
from tests.distributed.pool import Pool

STATEFUL = ("chunk_simple_gla", "linear_attn", "fused_recurrent_gsa")
STATES = {
    "chunk_simple_gla": "g+initial_state",
    "linear_attn": "initial_state+initial_z",
    "fused_recurrent_gsa": "g+initial_k+initial_v",
}


def of(operator: str, packed: bool = False) -> str:
    """A case with states and decay."""
    return f"{operator}-{STATES[operator]}{'+cu_seqlens' * packed}"


@pytest.mark.parametrize("operator", STATEFUL)
def test_lengths(pair: Pool, operator: str) -> None:
    """Uneven pieces, a rank without steps, no steps at all."""
    pair.run(comparing.compare_all, [(of(operator), ("time",), {"T": time}) for time in (0, 1, 2, 7)])


@pytest.mark.parametrize("operator", STATEFUL)
def test_packed_sequences(pair: Pool, operator: str) -> None:
    """That end on the border, cross it, or are empty: before, on and after it."""
    packs = [(0, 4, 8), (0, 0, 4, 4, 4, 7, 7), (0, 9), (0, 1, 8, 8), (0, 0, 5, 6), (0, 1)]
    pair.run(comparing.compare_all, [(of(operator, packed=True), ("time",), {"offsets": pack}) for pack in packs])


@pytest.mark.parametrize("scenario", ["strong-decay", "reverse", "reverse-packed", "several-chunks-ragged-tail"])
@pytest.mark.parametrize("operator", ["fused_recurrent_simple_gla", "chunk_simple_gla"])
def test_scenarios(pair: Pool, operator: str, scenario: str) -> None:
    pair.run(comparing.compare, f"{operator}-{scenario}", ("time",))


def transposed(calls: Any) -> None:
    """The comparisons with the exchange for many ranks."""
    usual = exchange.GATHERED_UP_TO
    exchange.GATHERED_UP_TO = 1
    try:
        comparing.compare_all(calls)
    finally:
        exchange.GATHERED_UP_TO = usual


def various(ranks: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """Cases with states, whole and packed."""
    calls: list[tuple[Any, ...]] = [(of(operator), ("time",), {"T": 11}, ranks) for operator in STATEFUL]
    calls += [(of(operator, packed=True), ("time",), {"offsets": (0, 0, 2, 9, 11)}, ranks) for operator in STATEFUL]
    return [*calls, ("fused_recurrent_simple_gla-reverse", ("time",), {}, ranks)]


def test_the_exchange_for_many_ranks(pair: Pool) -> None:
    pair.run(transposed, various((2,)))


@pytest.mark.slow
def test_four_ranks(four: Pool) -> None:
    """Sequences that enter and leave a piece."""
    four.run(comparing.compare_all, various((4,)))
    four.run(transposed, various((4,)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [("batch", "time"), ("time", "heads"), ("heads", "time"), ("batch", "heads"), ("heads", "heads"), ("time", "time")],
)
@pytest.mark.parametrize("operator", ["chunk_simple_gla", "fused_recurrent_gsa", "parallel_attn"])
def test_two_mesh_dimensions(four: Pool, operator: str, axes: tuple[str, str]) -> None:
    name = f"{operator}-g" if operator == "parallel_attn" else of(operator)
    heads = {"HK": 4, "H": 8} if operator == "chunk_simple_gla" else {"HQ": 8, "H": 4}
    four.run(comparing.compare, name, axes, heads | {"B": 4, "T": 9}, (2, 2))


def isolated() -> None:
    """A sequence of NaN that crosses the border, and others beside it."""
    mesh = comparing.mesh_of(2)
    case = comparing.by_name()[of("chunk_simple_gla", packed=True)].resized(offsets=(0, 1, 6, 8))
    inputs = case.inputs(torch.float64)
    for name in ("k", "v", "g"):
        inputs[name][:, 1:6] = float("nan")
    found = comparing.evaluate(case, comparing.place(case, inputs, ("time",), mesh))
    expected = comparing.evaluate(case, inputs)
    for name, x in expected.items():
        if x is not None:
            y = comparing.whole(found[name])
            assert torch.equal(x.isnan(), y.isnan()), name


def test_nan_stays_in_its_sequence(pair: Pool) -> None:
    pair.run(isolated)


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank puts into collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """DTensor first, which comes back here with its collectives."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if function.namespace == "_c10d_functional" and function.__name__.startswith("all_"):
            self.bytes[function.__name__.removesuffix(".default")] += args[0].numel() * args[0].element_size()
        return function(*args, **(kwargs or {}))


def sent(time: int, packed: bool) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """By operator, what a call sends, and its gradient."""
    mesh = comparing.mesh_of(2)
    heads, key, value, slots = 4, 16, 16, 8

    def make(*widths: int) -> DTensor:
        return distribute_tensor(-torch.rand(1, time, heads, *widths), mesh, [Shard(1)]).requires_grad_()

    q, k, v, s, g, gates = make(key), make(key), make(value), make(slots), make(), make(slots)
    packing = {"cu_seqlens": torch.tensor([0, 5, time // 3, time - 1, time])} if packed else {}
    calls = {
        "simple_gla": lambda: fla_ops.simple_gla(q, k, v, g, **packing)[0],
        "lightning_attn": lambda: fla_ops.lightning_attn(q, k, v, 1, 4, **packing)[0],
        "linear_attn": lambda: fla_ops.linear_attn(q, k, v, **packing)[0],
        "gsa": lambda: fla_ops.gsa(q, k, v, s, gates, **packing)[0],
    }
    found = {}
    for name, call in calls.items():
        with Sent() as forward:
            o = call()
        gradient = torch.ones_like(o)
        with Sent() as backward:
            o.backward(gradient)
        found[name] = dict(forward.bytes), dict(backward.bytes)
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_bytes_do_not_depend_on_the_length(pair: Pool, packed: bool) -> None:
    """One state and what is kept of it, [H, K, V] and [H], or twice that where both directions travel together."""
    first, *others = (pair.run(sent, time, packed) for time in (64, 512, 2048))
    assert all(found == first for found in others)
    state, kept = 4 * 4 * 16 * 16, 4 * 4
    assert first["simple_gla"] == (
        {"all_gather_into_tensor": state + kept},
        {"all_gather_into_tensor": 2 * state + kept},
    )
    both, slots = 4 * 4 * 8 * (16 + 16), 4 * 4 * 8
    once = both + 2 * slots
    assert first["gsa"] == ({"all_gather_into_tensor": once}, {"all_gather_into_tensor": 2 * once})
    kept, z = 4, 4 * (4 * 16 + 1)  # nothing decays: what is kept is one number
    numerator = state + kept, 2 * state + kept
    forward, backward = numerator[0] + z, numerator[1] + 2 * z
    assert first["linear_attn"] == ({"all_gather_into_tensor": forward}, {"all_gather_into_tensor": backward})


def chosen() -> tuple[str, int]:
    """What a dispatcher takes that prefers the quadratic form, where time is sharded; how many heads it looks at."""
    seen = []

    def order(c: Any) -> tuple[str, ...]:
        seen.append(c.v.shape[2])
        return ("parallel", "chunk")

    family = replace(forms.FAMILY, order=order)
    in_time, by_heads = (distribute_tensor(torch.randn(1, 8, 4, 3), comparing.mesh_of(2), [Shard(i)]) for i in (1, 2))
    assert family.choose(Call(by_heads, by_heads, by_heads)).form.name == "parallel"
    return family.choose(Call(in_time, in_time, in_time)).form.name, seen[0]


def test_a_dispatcher_takes_a_form_with_a_state_and_looks_at_what_a_rank_has(pair: Pool) -> None:
    assert pair.run(chosen) == ("chunk", 2)


def refused() -> None:
    """Heads that do not divide, a pool that would have to move, two meshes."""
    mesh = comparing.mesh_of(2)
    q = distribute_tensor(torch.randn(1, 8, 3, 4), mesh, [Shard(1)])
    message = (
        r"fla::parallel_attn_forward has no state to exchange along time.* multiples of the ranks, 2, got H = 3, HQ = 3"
    )
    with pytest.raises(ValueError, match=message):
        fla_ops.attn(q, q, q)
    with pytest.raises(ValueError, match=r"fla::chunk_gsa_forward has no state to exchange along time"):
        fla_ops.chunk_gsa(q, q, q, q)
    x = distribute_tensor(torch.randn(2, 4, 4), mesh, [Shard(1)])
    state = distribute_tensor(torch.zeros(2, 4, 4, 4), mesh, [Shard(2)])
    with pytest.raises(
        ValueError, match="updates state in place: it may be sharded along heads or along its first axis"
    ):
        fla_ops.simple_gla_step_(x, x, x, state)
    with pytest.raises(ValueError, match="must be on one mesh"):
        fla_ops.simple_gla(q, q, distribute_tensor(torch.randn(1, 8, 3, 4), comparing.mesh_of(1, 2), [Shard(1)] * 2))


def test_what_is_refused(pair: Pool) -> None:
    pair.run(refused)
