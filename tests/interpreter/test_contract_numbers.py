"""The contract's numbers and bits with the Triton kernels in place of ATen, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.cases import EXPORT, INDUCTOR, SMALL, Case, cases
from tests.contract import test_bits, test_numbers
from tests.contract.helpers import INTERPRETED, is_composite, is_typical, with_slow

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before Triton is imported"),
]


def takes(case: Case, argument: str) -> bool:
    """Whether the case's operator has an argument."""
    return any(a.name == argument for a in case.overload._schema.arguments)


HEADS = {("HK", "H"): (3, 6), ("H", "HQ"): (3, 6)}  # key heads, and the heads that share them


def one_sequence(case: Case) -> Case:
    """The case with fewer programs to interpret."""
    return case.resized(B=1) if "B" in case.sizes else case


def with_heads(case: Case, heads: tuple[int, int]) -> Case:
    """The case with this many heads, if it has the usual ones."""
    for letters, usual in HEADS.items():
        if tuple(case.sizes.get(letter) for letter in letters) == usual:
            return case.resized(**dict(zip(letters, heads, strict=True)))
    return case


def one_head(case: Case) -> Case:
    """The case with one sequence, and one key head that three share."""
    return with_heads(one_sequence(case), (1, 3))


def two_heads(case: Case) -> Case:
    """The case with all sequences, and two key heads that two share each."""
    return with_heads(case, (2, 4))


# A dispatcher runs the kernels of the others.
WHOLE = [case for case in cases(tag=SMALL) if not takes(case, "mode")]
CASES = [two_heads(case) if EXPORT in case.tags else one_head(case) for case in WHOLE]
KERNELS = [case for case in WHOLE if not is_composite(case)]
HALF = [one_sequence(case) for case in KERNELS if case.tags & {EXPORT, INDUCTOR}]


def is_quick(case: Case) -> bool:
    """A case of each operator, and one of packed sequences."""
    return bool(case.tags & {EXPORT, INDUCTOR})


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", with_slow(CASES, is_quick))
def test_float32(case: Case) -> None:
    """In memory that holds NaN until it is written."""
    test_numbers.check_numbers(case, "cpu", torch.float32)


@pytest.mark.parametrize("case", with_slow(HALF, is_typical))
def test_bfloat16(case: Case) -> None:
    test_numbers.check_numbers(case, "cpu", torch.bfloat16)


PACKED = [one_head(case) for case in KERNELS if "cu_seqlens" in case.given]
PACKED = [case.resized(offsets=(0, 0, 18, 19)) if "T" in case.sizes else case for case in PACKED]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_a_sequence_alone_or_in_a_pack_of_the_kernels(case: Case) -> None:
    test_bits.test_a_sequence_alone_or_in_a_pack(case, "cpu", torch.float32)
