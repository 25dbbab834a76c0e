"""Every operator on DTensors, along every axis: values, gradients and what is updated in place are one process's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._library.simple_registry import singleton
from torch.distributed.tensor import Shard, distribute_tensor

import fla_ops
from tests.cases import COMBINATION, Case, cases
from tests.contract.helpers import is_typical, operators
from tests.distributed import comparing
from tests.distributed.pool import Pool
from tests.numerics import close

AXES = ("replicate", "batch", "heads", "time", "pool")
CROSSING = (0, 1, 1, 5, 5)  # of the border between two ranks; two sequences are empty


def sizes_of(case: Case) -> dict[str, Any]:
    """Heads that two ranks can share, and sequences that cross the border."""
    heads = {"HK": 2, "H": 4} if "HK" in case.sizes else {"HQ": 4, "H": 2} if "HQ" in case.sizes else {"H": 4}
    in_time = "T" in case.sizes and len(case.sizes.get("offsets", ())) == len(CROSSING)
    return heads | ({"offsets": CROSSING} if in_time else {})


def has(case: Case, axis: str) -> bool:
    """Whether the first output has such an axis, or for a pool, whether the call addresses rows of one."""
    if axis == "pool":
        return "slots" in case.given
    if axis == "batch" and case.mutated and "cu_seqlens" in case.given:
        return False  # a state of each packed sequence, which does not move
    return axis == "replicate" or any(case.axis(case.outputs[0], letter) for letter in comparing.LETTERS[axis])


def selected(operator: str, quick: bool) -> list[Case]:
    """The least and the most of optional inputs, packed ones among them; or all combinations."""
    found = cases(operator, COMBINATION)
    if not quick:
        return found
    packed = [case for case in found if "cu_seqlens" in case.given][-1:]
    return list({str(case): case for case in (*filter(is_typical, found), *packed)}.values())


WITH_AXES = [(op.name, axis) for op in operators() for axis in AXES if any(has(c, axis) for c in cases(op.name))]


def check(pair: Pool, operator: str, axis: str, quick: bool) -> None:
    """The cases along this axis; where it can be sharded, what comes out is."""
    found = [case for case in selected(operator, quick) if has(case, axis)]
    calls = [(str(case), (axis,), sizes_of(case)) for case in found]
    for case, placements in zip(found, pair.run(comparing.compare_all, calls), strict=True):
        packed = axis == "batch" and "cu_seqlens" in case.given
        first = next(name for name in case.outputs if name in placements)
        summed = axis == "pool" and first not in case.mutated
        expected = "R" if axis == "replicate" or packed else "P(sum)" if summed else "S("
        pool = case.mutated[:1]
        if axis != "pool" and pool and not any(case.axis(*pool, letter) for letter in comparing.LETTERS[axis]):
            expected = "R"  # a pool does not move, so the call is whole along what it lacks
        if expected != "S(" and fla_ops.ops()[operator].kind == "composite":
            continue  # what an elementwise part makes of a sum or of a whole is DTensor's choice
        assert placements[first][0].startswith(expected), (str(case), placements)


@pytest.mark.parametrize(("operator", "axis"), WITH_AXES)
def test_values_and_gradients(pair: Pool, operator: str, axis: str) -> None:
    check(pair, operator, axis, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize(("operator", "axis"), WITH_AXES)
def test_every_combination_of_optional_inputs(pair: Pool, operator: str, axis: str) -> None:
    check(pair, operator, axis, quick=False)


def test_every_operator_has_a_rule() -> None:
    """Here fla_ops is imported before DTensor; the processes of the pool import DTensor first."""
    from torch.distributed.tensor import DTensor

    names = [name for name, operator in fla_ops.ops().items() if operator.kind != "composite"]
    rules = {name: singleton.find(f"fla::{name}").torch_dispatch_rules.find(DTensor) for name in names}
    assert not [name for name, rule in rules.items() if rule is None]


def beside_plain_tensors() -> None:
    """Plain decays of all heads and a plain state: they are cut as the call is, their gradients are plain and whole."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 4, 6, dtype=torch.float64).unbind()
    decay, state = -torch.rand(4, dtype=torch.float64), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for dim in range(3):
        results = []
        for place in (lambda x: x, lambda x, dim=dim: distribute_tensor(x, comparing.mesh_of(2), [Shard(dim)])):
            leaves = [*(place(x).requires_grad_() for x in (q.clone(), k.clone(), v.clone()))]
            leaves += [x.clone().requires_grad_() for x in (decay, state)]
            o, _ = fla_ops.chunk_simple_gla(*leaves[:3], g_gamma=leaves[3], initial_state=leaves[4])
            o.square().sum().backward()
            results.append([comparing.whole(o.detach()), *(x.grad for x in leaves)])
        assert [type(x) for x in results[1][4:]] == [torch.Tensor] * 2
        for found, expected in zip(results[1], results[0], strict=True):
            close(comparing.whole(found), expected)


def test_beside_plain_tensors(pair: Pool) -> None:
    pair.run(beside_plain_tensors)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [("pool", "pool"), ("pool", "heads"), ("heads", "pool")])
@pytest.mark.parametrize("operator", ["simple_gla_step_", "gsa_step_", "linear_attn_step_"])
def test_pools_on_two_mesh_dimensions(four: Pool, operator: str, axes: tuple[str, str]) -> None:
    case = next(case for case in cases(operator, COMBINATION) if "slots" in case.given)
    four.run(comparing.compare, str(case), axes, sizes_of(case), (2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(pair: Pool, dtype: torch.dtype) -> None:
    names = ("chunk_simple_gla-g+initial_state", "gsa-g+initial_k+initial_v", "parallel_attn-g+sink_bias")
    calls = [(n, (axis,), sizes_of(comparing.by_name()[n]), (2,), dtype) for n in names for axis in ("heads", "time")]
    pair.run(comparing.compare_all, calls)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param("chunk_simple_gla-g", {"HK": 1, "H": 4}, id="one-key-head-for-all"),
        pytest.param("chunk_gsa-g", {"HQ": 4, "H": 1}, id="one-state-for-all-query-heads"),
        pytest.param("gsa_step_-slots", {"HQ": 4, "H": 1}, id="one-pool-for-all-query-heads"),
        pytest.param("chunk_simple_gla-g", {}, id="three-key-heads-on-two-ranks"),
    ],
)
def test_heads_that_ranks_cannot_split_are_whole_on_each(pair: Pool, name: str, sizes: dict[str, int]) -> None:
    assert pair.run(comparing.compare, name, ("heads",), sizes)
