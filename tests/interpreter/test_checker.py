"""The memory checker on kernels with one fault each, which it must name, and on others, where it is silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton

from tests.contract.helpers import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

from . import planted
from .checker import Checker

pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def copy() -> Iterator[Any]:
    """An operator whose result may lack its last elements, and which may write into what it only reads."""
    with torch.library._scoped_library("fla_planted", "FRAGMENT") as library:
        library.define("copy(Tensor x, int short=0, bool spoil=False) -> Tensor")
        library.impl("copy", copied, "CPU")
        yield torch.ops.fla_planted.copy


def copied(x: torch.Tensor, short: int = 0, spoil: bool = False) -> torch.Tensor:
    y = torch.empty_like(x)
    planted.copy_kernel[(triton.cdiv(x.numel(), 8),)](x, y, x.numel() - short, BLOCK=8)
    if spoil:
        planted.same_block_kernel[(1,)](x, BLOCK=8)
    return y


def kinds(call: Callable[[], object], **options: Any) -> set[str]:
    with Checker(**options) as checker:
        call()
    return {kind for kind, *_ in checker.findings}


def numbers(size: int = 16) -> torch.Tensor:
    return torch.arange(float(size))


def test_nothing_is_found_where_nothing_is_wrong(copy: Any) -> None:
    with Checker() as checker:
        assert torch.equal(copy(numbers(21)), numbers(21))
    assert not checker.findings, checker.report()
    assert checker.launched == {"copy_kernel": 1}


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        pytest.param(kind, call, id=name)
        for name, kind, call in [
            ("load-past-the-end", "bounds", lambda: planted.copy_kernel[(3,)](numbers(21), numbers(24), 22, BLOCK=8)),
            ("store-past-the-end", "bounds", lambda: planted.copy_kernel[(3,)](numbers(24), numbers(21), 22, BLOCK=8)),
            ("in-a-gap", "bounds", lambda: planted.copy_kernel[(1,)](numbers(8), numbers(24)[::2], 8, BLOCK=8)),
            ("kernel", "uninitialised", lambda: planted.copy_kernel[(2,)](torch.empty(16), numbers(), 16, BLOCK=8)),
            ("host", "uninitialised", lambda: torch.empty(3) + 1),
            ("one-value-by-two-programs", "race", lambda: planted.same_block_kernel[(2,)](numbers(), BLOCK=8)),
            ("neighbour", "race", lambda: planted.neighbour_kernel[(2,)](numbers(), BLOCK=8)),
            ("one-store-twice", "race", lambda: planted.same_place_kernel[(1,)](numbers(), BLOCK=8)),
            ("own-store", "order", lambda: planted.mirror_kernel[(1,)](numbers(), BLOCK=8, ORDERED=False, num_warps=1)),
            ("few-elements", "in-place", lambda: planted.update_kernel[(1,)](numbers(), BLOCK=8, ORDERED=False)),
        ]
    ],
)
def test_fault(kind: str, call: Callable[[], object]) -> None:
    assert kinds(call) == {kind}


def test_store_into_an_argument_that_is_only_read(copy: Any) -> None:
    assert kinds(lambda: copy(numbers(), 0, True)) == {"read-only"}


def test_result_that_is_not_written_to_its_end(copy: Any) -> None:
    assert kinds(lambda: copy(numbers(), 1)) == {"unwritten"}


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(
            lambda: planted.update_kernel[(1,)](numbers(), BLOCK=8, ORDERED=False, num_warps=1), id="one-warp"
        ),
        pytest.param(lambda: planted.update_kernel[(1,)](numbers(), BLOCK=8, ORDERED=True), id="barrier"),
        pytest.param(lambda: planted.update_kernel[(1,)](numbers(128), BLOCK=128, ORDERED=False), id="own-elements"),
        pytest.param(lambda: planted.mirror_kernel[(1,)](numbers(), BLOCK=8, ORDERED=True), id="two-barriers"),
    ],
)
def test_what_orders_the_threads_of_a_program(call: Callable[[], object]) -> None:
    assert kinds(call) == set()


def test_atomics_are_refused() -> None:
    with pytest.raises(Exception, match="atomic_kernel has an atomic"), Checker():
        planted.atomic_kernel[(2,)](numbers(), BLOCK=8)


def test_offsets_of_more_than_32_bits() -> None:
    x = torch.empty(70000, 32768, device="meta")

    def last(count: int) -> list[int]:
        return [count - 1]

    assert kinds(lambda: planted.rows_kernel[(70000,)](x, 32768, BLOCK=16), some_programs=last) == {
        "overflow",
        "bounds",
    }
    assert not kinds(lambda: planted.rows_kernel[(65535,)](x, 32768, BLOCK=16), some_programs=last)


def test_the_interpreter_is_given_back() -> None:
    kinds(lambda: planted.update_kernel[(1,)](numbers(), BLOCK=8, ORDERED=True))
    y = numbers()
    planted.update_kernel[(1,)](y, BLOCK=8, ORDERED=True)
    assert torch.equal(y[:8], numbers()[:8] + 1)
