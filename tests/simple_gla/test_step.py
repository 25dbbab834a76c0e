"""The decode step of simple_gla: equal to the recurrence, in a pool of slots, in place, compiled without a copy."""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fla_ops
from tests import numerics
from tests.contract.helpers import DEVICES

N, P, HK, H, K, V = 4, 9, 3, 6, 10, 7
STEPS = 20
SLOTS = (7, 0, 3, 5)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def sequence(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and g of N sequences of STEPS steps."""
    q, k, v = (draw(N, STEPS, *shape, seed=i, dtype=dtype) for i, shape in enumerate([(HK, K), (HK, K), (H, V)]))
    return q.to(device), (k * K**-0.5).to(device), v.to(device), -draw(N, STEPS, H, seed=3).abs().to(device)


def decode(pool: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, slots: Tensor | None = None) -> Tensor:
    """All steps, one after the other, with the pool updated at each."""
    return torch.stack(
        [fla_ops.simple_gla_step_(q[:, t], k[:, t], v[:, t], pool, g[:, t], slots=slots) for t in range(q.shape[1])], 1
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_twenty_steps_equal_the_recurrence(dtype: torch.dtype, device: str) -> None:
    q, k, v, g = sequence(dtype, device)
    start = draw(N, H, K, V).to(device)
    pool, state = start.clone(), start
    o = decode(pool, q, k, v, g)
    for t in range(STEPS):
        now = slice(t, t + 1)
        expected, state = fla_ops.fused_recurrent_simple_gla(
            q[:, now], k[:, now], v[:, now], g[:, now], initial_state=state, output_final_state=True
        )
        numerics.close(o[:, now], expected)
    whole, final = fla_ops.fused_recurrent_simple_gla(q, k, v, g, initial_state=start, output_final_state=True)
    numerics.close(o, whole)
    numerics.close(pool, final)
    numerics.close(pool, state)


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_a_pool(pool_dtype: torch.dtype) -> None:
    """Slots say which rows; they may be in any order, and the other rows stay as they are."""
    q, k, v, g = sequence()
    pool = draw(P, H, K, V, dtype=pool_dtype)
    before, rows = pool.clone(), list(SLOTS)
    own = pool[rows].clone()
    o = decode(pool, q, k, v, g, torch.tensor(SLOTS))
    assert torch.equal(o, decode(own, q, k, v, g))
    assert torch.equal(pool[rows], own)
    others = [p for p in range(P) if p not in SLOTS]
    assert torch.equal(pool[others], before[others])


def test_half_precision_pool_is_rounded_once_a_step() -> None:
    """The arithmetic is float32: a step in a bfloat16 pool is the float32 step on the same values, then rounded."""
    q, k, v, g = (x[:, 0] for x in sequence())
    half = draw(N, H, K, V, dtype=torch.bfloat16)
    wide = half.float()
    o, expected = fla_ops.simple_gla_step_(q, k, v, half, g), fla_ops.simple_gla_step_(q, k, v, wide, g)
    assert torch.equal(o, expected)
    assert torch.equal(half, wide.bfloat16())


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_padding_reads_and_writes_nothing(index: torch.dtype) -> None:
    q, k, v, g = (x[:, 0] for x in sequence())
    slots = torch.tensor([7, -1, 3, -1], dtype=index)
    pool = torch.full((P, H, K, V), float("nan"))
    pool[7], pool[3] = draw(H, K, V, seed=1), draw(H, K, V, seed=2)
    real = [0, 2]
    own = pool[[7, 3]].clone()
    padded = [x.index_fill(0, torch.tensor([1, 3]), float("nan")) for x in (q, k, v, g)]
    o = fla_ops.simple_gla_step_(*padded[:3], pool, padded[3], slots=slots)
    assert o[[1, 3]].count_nonzero() == 0
    assert torch.equal(o[real], fla_ops.simple_gla_step_(q[real], k[real], v[real], own, g[real]))
    assert torch.equal(pool[[7, 3]], own)
    assert pool[[p for p in range(P) if p not in (7, 3)]].isnan().all()


def test_padding_alone() -> None:
    q, k, v, g = (x[:, 0] for x in sequence())
    pool = torch.full((P, H, K, V), float("nan"))
    o = fla_ops.simple_gla_step_(q, k, v, pool, g, slots=torch.full((N,), -1))
    assert o.count_nonzero() == 0
    assert pool.isnan().all()


@pytest.mark.parametrize(
    ("cut", "shape"),
    [
        pytest.param(lambda cache: cache[:, 1], (P, 3, H, K, V), id="a-layer-of-a-cache-by-sequence"),
        pytest.param(lambda cache: cache[1], (3, P, H, K, V), id="a-layer-of-a-cache-by-layer"),
        pytest.param(lambda cache: cache.mT, (P, H, V, K), id="value-first"),
        pytest.param(lambda cache: cache[..., ::2], (P, H, K, 2 * V), id="spaced"),
    ],
)
def test_pool_may_have_any_strides(cut: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    q, k, v, g = (x[:, 0] for x in sequence())
    cache = draw(*shape)
    before, pool = cache.clone(), cut(cache)
    own = pool.contiguous().clone()
    slots = torch.tensor(SLOTS)
    o, expected = (fla_ops.simple_gla_step_(q, k, v, states, g, slots=slots) for states in (pool, own))
    if pool.stride(2) == 1:  # a sum over K along memory has another order
        numerics.close(o, expected)
    else:
        assert torch.equal(o, expected)
    assert torch.equal(pool, own)
    outside = torch.ones_like(cache, dtype=torch.bool)
    cut(outside)[:] = False
    assert torch.equal(cache[outside], before[outside])


def test_value_first_is_the_view_of_such_a_pool() -> None:
    q, k, v, g = (x[:, 0] for x in sequence())
    pool = draw(N, H, V, K)
    view = pool.clone().mT
    o = fla_ops.simple_gla_step_(q, k, v, pool, g, state_v_first=True)
    assert torch.equal(o, fla_ops.simple_gla_step_(q, k, v, view, g))
    assert torch.equal(pool, view.mT)


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, slots: Tensor | None) -> Tensor:
    """A layer that computes its query and reads its output."""
    return fla_ops.simple_gla_step_(q * 2, k, v, state, g, slots=slots) + 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("shape", "cut", "slots"),
    [
        pytest.param((N, H, K, V), lambda cache: cache, None, id="state"),
        pytest.param((3, N, H, K, V), lambda cache: cache[1], None, id="a-layer-of-a-cache"),
        pytest.param((P, H, K, V), lambda cache: cache, SLOTS, id="pool"),
    ],
)
def test_compiled_step_updates_in_place_without_a_copy(
    shape: tuple[int, ...], cut: Callable[[Tensor], Tensor], slots: tuple[int, ...] | None
) -> None:
    q, k, v, g = (x[:, 0].contiguous() for x in sequence())
    index = None if slots is None else torch.tensor(slots)
    cache = draw(*shape)
    expected_cache = cache.clone()
    expected = step(q, k, v, g, cut(expected_cache), index)

    def layer(cache: Tensor) -> Tensor:
        return step(q, k, v, g, cut(cache), index)

    with torch.no_grad():
        o, (code,) = run_and_get_code(torch.compile(layer, fullgraph=True), cache)
    numerics.close(o, expected)
    assert torch.equal(cache, expected_cache)
    body = code[code.index("def call(") :]
    assert "simple_gla_step_" in body
    copies = re.findall(r"\w*(?:clone|copy|auto_functionalized)\w*\(", body)
    assert not copies, f"the state is copied by {copies}"
    sizes = [literal_eval(size) for size in re.findall(r"empty_strided_\w+\((\([\d, ]*\))", body)]
    assert all(torch.Size(size).numel() < N * H * K * V for size in sizes), f"buffers of {sizes} hold a state"


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_steps_in_a_row_see_each_other() -> None:
    """Two updates of one state in one graph keep their order, and a read between them sees the first."""
    q, k, v, g = (x[:, 0] for x in sequence())
    state = draw(N, H, K, V)

    def twice(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = fla_ops.simple_gla_step_(q, k, v, state, g)
        between = state.sum()
        return first, between, fla_ops.simple_gla_step_(q, k, v, state, g)

    own = state.clone()
    expected = twice(own)
    found = torch.compile(twice, fullgraph=True, backend="aot_eager")(state)
    for x, y in zip((*found, state), (*expected, own), strict=True):
        assert torch.equal(x, y)
