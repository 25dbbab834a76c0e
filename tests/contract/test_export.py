"""torch.export with dynamic batch and time: saved, loaded, run at other sizes; decompositions leave the operators."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cases import EXPORT, INDUCTOR, Case, cases, results
from tests.contract.helpers import assert_same_bits, evaluate, export, is_composite, labelled, ours, tensors_of


def larger(case: Case) -> Case:
    """The case at sizes that its export has not seen."""
    if "offsets" in case.sizes:
        return case.resized(offsets=(0, 7, 7, 50, 51, 52, 90))
    return case.resized(**{x: n for x, n in {"B": 3, "T": 71, "N": 7, "P": 12}.items() if x in case.sizes})


@pytest.mark.parametrize(
    "case", [c for c in cases() if EXPORT in c.tags or (INDUCTOR in c.tags and "offsets" in c.sizes)], ids=str
)
def test_saved_loaded_and_run_at_other_sizes(case: Case, tmp_path: Path) -> None:
    program = export(case)
    torch.export.save(program, tmp_path / "layer.pt2")
    program = torch.export.load(tmp_path / "layer.pt2")
    calls = ours([program.graph_module])
    assert len(calls) == 1
    if not is_composite(case):
        assert calls == [case.operator]
    for other in (case, larger(case)):
        inputs = other.inputs(seed=1)
        given = {name: x.clone() for name, x in tensors_of(inputs).items()}
        found = program.module()(given)
        outputs = (*results(found), *(given[name] for name in case.mutated))
        assert_same_bits(dict(labelled(case.outputs, outputs)), evaluate(other, inputs, wanted=()))


@pytest.mark.parametrize("case", cases(tag=EXPORT), ids=str)
def test_operators_survive_decomposition(case: Case) -> None:
    program = export(case)
    before = ours([program.graph_module])
    after = ours([program.run_decompositions().graph_module])
    assert len(before) == 1
    assert after == before or (is_composite(case) and after)
