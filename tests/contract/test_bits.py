"""Every element written, equal bits from two runs, and a sequence's result whatever shares its batch or pack."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import COMBINATION, Case, Inputs, cases
from tests.contract.helpers import (
    Named,
    assert_same_bits,
    cotangents,
    detached,
    evaluate,
    is_composite,
    params,
    same_bits,
)

DTYPES = (torch.float32, torch.bfloat16)
SCENARIOS = [case for case in cases() if COMBINATION not in case.tags]
ONE_FORM = [case for case in SCENARIOS if not is_composite(case)]  # a dispatcher chooses by the length


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("case", "device"), params(SCENARIOS))
def test_every_element_is_written(case: Case, device: str) -> None:
    assert torch.empty(3).isnan().all(), "memory that was not written should hold NaN here"
    results = evaluate(case, case.inputs(device=device))
    unwritten = [name for name, x in results.items() if x is not None and x.isnan().any()]
    assert not unwritten, f"NaN in {', '.join(unwritten)}"


@pytest.mark.parametrize(("case", "device", "dtype"), params(SCENARIOS, dtypes=DTYPES))
def test_two_runs_give_the_same_bits(case: Case, device: str, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, device)
    assert_same_bits(evaluate(case, inputs), evaluate(case, inputs))


def part_of(case: Case, name: str, x: Any, spans: dict[str, slice]) -> Any:
    """What belongs to one sequence: each axis that `spans` names, cut."""
    if not isinstance(x, Tensor):
        return x
    cut = [slice(None)] * x.dim()
    for letter, span in spans.items():
        for i in case.axis(name, letter):
            cut[i] = span
    return x[tuple(cut)]


def check_alone(case: Case, inputs: Inputs, spans: dict[str, slice], together: Named, arriving: Named) -> None:
    """One sequence on its own must give the bits that it gave in company."""
    own = {name: part_of(case, name, x, spans) for name, x in inputs.items() if not name.startswith("cu_seqlens")}
    if "cu_seqlens" in inputs:
        own["cu_seqlens"] = inputs["cu_seqlens"].new_tensor([0, spans["T"].stop - spans["T"].start])
    if "cu_seqlens_k" in inputs:
        own["cu_seqlens_k"] = inputs["cu_seqlens_k"].new_tensor([0, spans["TK"].stop - spans["TK"].start])
    if "slots" in inputs:
        own["slots"] = torch.zeros_like(own["slots"])  # of a pool with its row alone
    upstream = {name: part_of(case, name, x, spans) for name, x in arriving.items()}
    alone = evaluate(case, own, arriving=upstream)
    shared = {f"d{name}" for name in case.trained if not any(case.axis(name, letter) for letter in spans)}
    different = [
        name
        for name, x in alone.items()
        if name not in shared and not same_bits(x, part_of(case, name.removeprefix("d"), together[name], spans))
    ]
    assert not different, f"{', '.join(different)} of {spans} depend on the other sequences"


@pytest.mark.parametrize(
    ("case", "device", "dtype"), params([c for c in ONE_FORM if "cu_seqlens" in c.given], dtypes=DTYPES)
)
def test_a_sequence_alone_or_in_a_pack(case: Case, device: str, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, device)
    arriving = cotangents(detached(evaluate(case, inputs, wanted=())))
    together = evaluate(case, inputs, arriving=arriving)
    offsets = case.sizes["offsets"]
    for n, (start, end) in enumerate(pairwise(offsets)):
        spans = {"T": slice(start, end), "N": slice(n, n + 1)}
        if "cu_seqlens_k" in inputs:
            spans["TK"] = slice(*inputs["cu_seqlens_k"][n : n + 2].tolist())
        if "slots" in inputs:
            row = int(inputs["slots"][n])
            if row < 0:  # padding has no row
                continue
            spans["P"] = slice(row, row + 1)
        if "every" in inputs:
            counts = [(b - a) // inputs["every"] for a, b in pairwise(offsets)]
            spans["C"] = slice(sum(counts[:n]), sum(counts[: n + 1]))
        check_alone(case, inputs, spans, together, arriving)


@pytest.mark.parametrize(
    ("case", "device", "dtype"),
    params([c for c in ONE_FORM if "cu_seqlens" not in c.given and "slots" not in c.given], dtypes=DTYPES),
)
def test_a_sequence_alone_or_in_a_batch(case: Case, device: str, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, device)
    arriving = cotangents(detached(evaluate(case, inputs, wanted=())))
    together = evaluate(case, inputs, arriving=arriving)
    for n in range(case.sizes["B" if "B" in case.sizes else "N"]):
        spans = {"B": slice(n, n + 1), "N": slice(n, n + 1)}
        if "every" in inputs:
            count = case.sizes["T"] // inputs["every"]
            spans["C"] = slice(n * count, (n + 1) * count)
        check_alone(case, inputs, spans, together, arriving)
