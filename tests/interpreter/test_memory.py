"""Memory and races where the other tests of this folder, which run under the same checker, do not come: several blocks
of every width, sizes past 2^31 elements, cases that are too slow to run each time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from fla_ops import launch
from tests.cases import COMBINATION, Case, cases
from tests.contract import test_numbers
from tests.contract.helpers import INTERPRETED, evaluate, is_composite

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

from .checker import Checker
from .test_contract_numbers import KERNELS, WHOLE, one_head, one_sequence

pytestmark = pytest.mark.interpreter

# The smallest blocks that a product, or a kernel without one, can have.
SMALLEST = {
    "BT": 16,
    "BK": 16,
    "BV": 16,
    "BM": 16,
    "BN": 16,
    "BU": 16,
    "BR": 2,
    "BS": 2,
    "BD": 16,
    "BP": 2,
    "SPLIT": 32,
    "TILE": 16,
}
BLOCKS = {
    "group_sum": {"BLOCK": 64},
    "channel_recurrent": {"BLOCK": 4},
    "fused_recurrent": {"BV": 4},
    "decoding": {"BK": 4, "BV": 4},
    "normalize_step": {"BK": 4, "BV": 4},
    "softmax_gradient": {"BT": 2},
}
WIDE = {"K": 36, "V": 33, "M": 35}  # three blocks of each, the last not full
LARGE = 2**31
LONG = ("recurrent", "without_gates")  # walks of many steps, and kernels that another call launches too

LAUNCHES = {
    path.parent.name: importlib.import_module(f"tests.{path.parent.name}.launches")
    for path in sorted(Path(__file__).parents[1].glob("*/launches.py"))
}
ENTRY = launch.entry


@pytest.fixture
def smallest_blocks() -> Iterator[None]:
    def entry(kernel: str, x: torch.Tensor, key_width: int, value_width: int) -> launch.Entry:
        found, limits = ENTRY(kernel, x, key_width, value_width), SMALLEST | BLOCKS.get(kernel, {})
        return found | {name: min(size, limits[name]) for name, size in found.items() if name in limits}

    with mock.patch.object(launch, "entry", entry):
        yield


def wide(case: Case) -> Case:
    """The case with several blocks of every width, and of steps."""
    steps = {} if "offsets" in case.sizes else {"T": 27}
    return one_head(case).resized(**{letter: n for letter, n in (WIDE | steps).items() if letter in case.sizes})


def everything(found: list[Case]) -> list[Case]:
    """Of each operator the case that gives most of its arguments."""
    fullest: dict[str, Case] = {}
    for case in found:
        known = fullest.setdefault(case.operator, case)
        if len(case.given) > len(known.given):
            fullest[case.operator] = case
    return list(fullest.values())


OURS = [*KERNELS, *(case for case in WHOLE if case.operator in ("chunk_gsa", "parallel_attn"))]
FULLEST = [c for c in everything(OURS) if not c.operator.startswith("fused_recurrent")]  # steps take longest


def seldom(slow: bool) -> Any:
    """The marks of a parameter."""
    return pytest.mark.slow if slow else ()


@pytest.mark.usefixtures("smallest_blocks")
@pytest.mark.parametrize(
    "case",
    [pytest.param(wide(c), id=str(c), marks=seldom(c not in FULLEST or LONG[0] in c.operator)) for c in OURS],
)
def test_several_blocks_of_every_width(case: Case) -> None:
    with Checker() as checker:
        test_numbers.check_numbers(case, "cpu", torch.float32)
    assert not checker.findings, checker.report()


@pytest.mark.slow
@pytest.mark.usefixtures("smallest_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [one_sequence(c) for c in cases(tag=COMBINATION) if not is_composite(c)], ids=str)
def test_every_combination_of_optional_inputs(case: Case, dtype: torch.dtype) -> None:
    with Checker() as checker:
        evaluate(case, case.inputs(dtype))
    assert not checker.findings, checker.report()


@pytest.mark.slow
@pytest.mark.usefixtures("smallest_blocks")
@pytest.mark.parametrize(
    ("case", "name"), [pytest.param(one_sequence(c), n, id=f"{c}-{n}") for c in FULLEST for n in c.trained]
)
def test_one_gradient_alone(case: Case, name: str) -> None:
    with Checker() as checker:
        evaluate(case, case.inputs(), wanted=[name])
    assert not checker.findings, checker.report()


def middle_and_last(count: int) -> list[int]:
    """Of the programs of a launch."""
    return sorted({count // 2, count - 1})


def sizes_beyond(family: ModuleType, sequences: bool) -> dict[str, int]:
    """Sizes with which activations of 64 columns pass 2^31 elements: by many sequences, or by many heads of one."""
    heads = {name: size for name, size in family.SIZES.items() if "heads" in name}
    if sequences:
        return {"batch": LARGE // (65 * 64 * min(heads.values())) + 3, "time": 65}
    scale = 2**16
    return {"batch": 1, "time": LARGE // (scale * 64) + 33} | {name: size * scale // 2 for name, size in heads.items()}


@pytest.mark.parametrize(
    "sequences",
    [pytest.param(True, id="many-sequences"), pytest.param(False, id="many-heads", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("family", "call"),
    [
        pytest.param(
            family,
            call,
            id=f"{name}-{call.__name__}",
            marks=seldom(any(word in call.__name__ for word in LONG)),
        )
        for name, family in LAUNCHES.items()
        for call in dict.fromkeys(call for calls in family.CALLS.values() for call in calls)
        if call is not family.step
    ],
)
def test_offsets_past_2_to_the_31(
    family: ModuleType, call: Callable[[torch.dtype, int, int], None], sequences: bool
) -> None:
    """On tensors without memory; of each launch a program in the middle and the last."""
    with (
        mock.patch.dict(family.SIZES, sizes_beyond(family, sequences)),
        mock.patch.object(torch, "zeros", partial(torch.zeros, device="meta")),
        Checker(some_programs=middle_and_last) as checker,
    ):
        call(torch.bfloat16, 64, 64)
    assert checker.launched
    assert not checker.findings, checker.report()
