"""The pair of states that gsa's public functions take, its pools, and how far a gate that is no number reaches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fla_ops
from tests import numerics
from tests.contract.helpers import same_bits

SIZES = {"B": 3, "T": 70, "HQ": 4, "H": 2, "K": 10, "V": 7, "M": 5}
FORMS = ("chunk_gsa", "fused_recurrent_gsa", "gsa")
PAIR = r"initial_state must be a pair \(\[N, H, K, M\], \[N, H, M, V\]\), got "


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(**changed: int) -> dict[str, Tensor]:
    """q, k, v, s, g."""
    b, t, query_heads, h, k, v, m = (SIZES | changed).values()
    return {
        "q": draw(b, t, query_heads, k, seed=1),
        "k": draw(b, t, h, k, seed=2) * k**-0.5,
        "v": draw(b, t, h, v, seed=3),
        "s": draw(b, t, h, m, seed=4),
        "g": -draw(b, t, h, m, seed=5).abs() / 4,
    }


def states(**changed: int) -> tuple[Tensor, Tensor]:
    """A pair of states, one for each sequence."""
    b, _, _, h, k, v, m = (SIZES | changed).values()
    return draw(b, h, k, m, seed=6), draw(b, h, m, v, seed=7)


def refused_states() -> list[Any]:
    keys, values = states()
    return [
        pytest.param(keys, TypeError, "Tensor", id="one-tensor"),
        pytest.param({"k": keys, "v": values}, TypeError, "dict", id="a-mapping"),
        pytest.param((keys,), ValueError, "1 states", id="the-keys-alone"),
        pytest.param((keys, values, values), ValueError, "3 states", id="three"),
        pytest.param((None, values), ValueError, "None for the keys; give zeros instead", id="no-keys"),
        pytest.param((keys, None), ValueError, "None for the values; give zeros instead", id="no-values"),
        pytest.param((None, None), ValueError, "None for the keys; give zeros instead", id="neither"),
    ]


@pytest.mark.parametrize(("pair", "error", "got"), refused_states())
@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_pair_is_refused(form: str, pair: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error, match=PAIR + got):
        getattr(fla_ops, form)(**inputs(), initial_state=pair)


@pytest.mark.parametrize(("pair", "error", "got"), refused_states())
def test_explain_refuses_it_too(pair: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error, match=PAIR + got):
        fla_ops.explain(fla_ops.gsa, **inputs(), initial_state=pair)


@pytest.mark.parametrize("form", FORMS)
def test_a_list_of_two_is_a_pair(form: str) -> None:
    run = getattr(fla_ops, form)
    expected, _ = run(**inputs(), initial_state=states())
    o, _ = run(**inputs(), initial_state=list(states()))
    assert same_bits(o, expected)


def test_explain_takes_the_functions_arguments() -> None:
    choice = fla_ops.explain(fla_ops.gsa, **inputs(), initial_state=states(), reverse=True)
    assert choice.form.name == "fused_recurrent"
    assert "chunk refuses: reverse=True runs time backwards" in str(choice)


@pytest.mark.parametrize("form", FORMS)
def test_one_state_of_the_operator_is_one_beside_zeros(form: str) -> None:
    """The operators take their states one by one: a missing one is zeros."""
    operator, (keys, values) = getattr(torch.ops.fla, form), states()
    arguments = inputs()
    for pair in ((keys, None), (None, values)):
        o, *_ = operator(**arguments, initial_k=pair[0], initial_v=pair[1])
        full = [torch.zeros_like(x) if given is None else given for given, x in zip(pair, (keys, values), strict=True)]
        expected, *_ = operator(**arguments, initial_k=full[0], initial_v=full[1])
        numerics.close(o, expected)


STEPS = [
    pytest.param(SIZES | changed, id=name)
    for name, changed in (
        ("small", {}),
        ("one-head", {"HQ": 1, "H": 1, "K": 20, "V": 70, "M": 18}),
        ("products", {"HQ": 8, "H": 4, "K": 64, "V": 64, "M": 64}),
        ("groups", {"HQ": 12, "H": 3, "K": 33, "V": 17, "M": 5}),
    )
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", STEPS)
def test_a_step_has_the_same_bits_alone_or_in_a_batch(sizes: dict[str, int], dtype: torch.dtype) -> None:
    """Small states and those that are large enough for a matrix product each."""
    sequences = 6
    arguments = {name: x[:, 0].to(dtype) for name, x in inputs(**sizes | {"B": sequences}).items()}
    pools = states(**sizes | {"B": sequences})
    together = [x.clone() for x in pools]
    o = fla_ops.gsa_step_(**arguments, state_k=together[0], state_v=together[1])
    for first, last in itertools.combinations(range(sequences + 1), 2):
        own = {name: x[first:last].clone() for name, x in arguments.items()}
        apart = [x[first:last].clone() for x in pools]
        alone = fla_ops.gsa_step_(**own, state_k=apart[0], state_v=apart[1])
        assert same_bits(alone, o[first:last])
        assert all(same_bits(x, y[first:last]) for x, y in zip(apart, together, strict=True))


BAD = [float("nan"), float("inf")]


def run(form: str, arguments: dict[str, Tensor], **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of the arguments for a fixed one that arrives."""
    trained = {name: x.clone().requires_grad_() for name, x in arguments.items()}
    o, _ = getattr(fla_ops, form)(**trained, **options)
    return o.detach(), list(torch.autograd.grad(o, list(trained.values()), draw(*o.shape, seed=8)))


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("step", [0, 31, 32, 45, 69])
def test_a_gate_that_is_no_number_stays_in_its_sequence_and_after_its_step(form: str, step: int, value: float) -> None:
    """It reaches every output of its head from its step on, and nothing else."""
    good, bad = inputs(), inputs()
    bad["g"][1, step, 0, 2] = value
    expected, gradients = run(form, good)
    o, found = run(form, bad)
    for x, y in zip((o, *found), (expected, *gradients), strict=True):
        assert same_bits(x[0], y[0])
        assert same_bits(x[2], y[2])
    assert same_bits(o[1, :step], expected[1, :step])
    group = SIZES["HQ"] // SIZES["H"]
    assert same_bits(o[1, :, group:], expected[1, :, group:]), "heads are independent"


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("form", FORMS[:2])
def test_a_gate_that_is_no_number_stays_in_its_part_of_a_pack(form: str, value: float) -> None:
    offsets = torch.tensor([0, 20, 45, 70])
    good, bad = inputs(B=1), inputs(B=1)
    bad["g"][:, 30, 1, 0] = value
    expected, gradients = run(form, good, cu_seqlens=offsets)
    o, found = run(form, bad, cu_seqlens=offsets)
    for x, y in zip((o, *found), (expected, *gradients), strict=True):
        assert same_bits(x[:, :20], y[:, :20])
        assert same_bits(x[:, 45:], y[:, 45:])
    assert same_bits(o[:, :30], expected[:, :30])


def test_a_step_with_a_gate_that_is_no_number_stays_in_its_sequence() -> None:
    arguments = {name: x[:, 0] for name, x in inputs().items()}
    bad = arguments | {"g": arguments["g"].clone()}
    bad["g"][1, 0, 2] = float("nan")
    o = fla_ops.gsa_step_(**arguments, **dict(zip(("state_k", "state_v"), states(), strict=True)))
    found = fla_ops.gsa_step_(**bad, **dict(zip(("state_k", "state_v"), states(), strict=True)))
    assert same_bits(found[0], o[0])
    assert same_bits(found[2], o[2])
    assert found[1].isnan().any()


def shared_pools() -> list[Any]:
    """Pools in which an element lies twice, or that lie in one another."""
    n, heads, width = 3, 2, 4
    memory = torch.zeros(2 * n * heads * width * width)
    first, second = memory[: n * heads * width * width], memory[n * heads * width * width - 1 : -1]
    keys, values, shifted = (x.view(n, heads, width, width) for x in (first, second, second.clone()))
    return [
        pytest.param(keys, keys, "state_[kv] and state_[kv]", id="one-tensor-for-both"),
        pytest.param(keys, values, "state_[kv] and state_[kv]", id="pools-that-overlap"),
        pytest.param(keys, keys.mT, "state_[kv] and state_[kv]", id="another-view-of-the-same-memory"),
        pytest.param(keys[:1].expand(n, -1, -1, -1), shifted, "state_k", id="one-row-for-all"),
        pytest.param(
            keys, shifted.as_strided(keys.shape, (3, 12, 2, 1)), "state_v", id="rows-that-begin-inside-one-another"
        ),
    ]


@pytest.mark.parametrize(("state_k", "state_v", "which"), shared_pools())
def test_pools_that_share_memory_are_refused(state_k: Tensor, state_v: Tensor, which: str) -> None:
    """Nothing is updated, and a call of the same shapes that was accepted before makes no difference."""
    arguments = {name: x[:, 0] for name, x in inputs(T=1, HQ=2, K=4, V=4, M=4).items()}
    fla_ops.gsa_step_(**arguments, state_k=torch.zeros(3, 2, 4, 4), state_v=torch.zeros(3, 2, 4, 4))
    with pytest.raises(ValueError, match=f"{which} (is|are) updated in place"):
        fla_ops.gsa_step_(**arguments, state_k=state_k, state_v=state_v)
    assert not state_k.any()
    assert not state_v.any()
