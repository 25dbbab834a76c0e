"""Exported programs made of ATen calls: no operator of ours is left, and the numbers are the same at other sizes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._ops import OpOverload

import fla_ops
from tests import numerics
from tests.cases import EXPORT, Case, cases, results
from tests.contract.helpers import assert_close, evaluate, export, is_composite, labelled, ours, tensors_of

PAGE = Path(__file__).parents[1] / "docs" / "exporting.md"
REFUSED = ("gsa", "attn")  # families whose bodies read values


def family(case: Case) -> str:
    """The last word of the operator's name that tells."""
    if "gsa" in case.operator:
        return "gsa"
    return "attn" if case.operator in ("attn", "parallel_attn", "attn_decoding_one_step") else "linear"


def of(*, refused: bool) -> list[Case]:
    return [case for case in cases(tag=EXPORT) if (family(case) in REFUSED) == refused]


def timed(case: Case, time: int) -> Case:
    """The case with so many steps, if it has any."""
    return case.resized(T=time) if "T" in case.sizes else case


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=[pytest.mark.slow] * is_composite(c)) for c in of(refused=False)]
)
def test_a_program_becomes_aten_calls(case: Case) -> None:
    case = timed(case, 150)
    program = export(case).run_decompositions(fla_ops.decompositions())
    assert ours([program.graph_module]) == []
    targets = {node.target for node in program.graph.nodes if isinstance(node.target, OpOverload)}
    assert {str(t) for t in targets if torch.Tag.core not in t.tags} <= {"aten._assert_async.msg"}
    more = {x: n for x, n in {"B": 3, "N": 7, "P": 12}.items() if x in case.sizes}
    for other in (case, timed(case.resized(**more), 230)):
        inputs = other.inputs(seed=1)
        given = {name: x.clone() for name, x in tensors_of(inputs).items()}
        found = program.module()(given)
        outputs = (*results(found), *(given[name] for name in case.mutated))
        assert_close(dict(labelled(case.outputs, outputs)), evaluate(other, inputs, wanted=()))


@pytest.mark.parametrize("case", of(refused=True), ids=str)
def test_what_has_no_body_is_refused_by_name(case: Case) -> None:
    program = export(case)
    with pytest.raises(NotImplementedError, match=r"fla\.\w+\.default on cpu has no body of ATen calls"):
        program.run_decompositions(fla_ops.decompositions())


def test_the_page_runs_and_onnxruntime_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)), str(PAGE), "exec"), names)
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    for batch, time in ((2, 200), (3, 330)):
        q, k, v = torch.randn(3, batch, time, 4, 16).unbind()
        inputs = (q, k, v, -torch.rand(batch, time, 4))
        given = {x.name: y.numpy() for x, y in zip(session.get_inputs(), inputs, strict=True)}
        for found, expected in zip(session.run(None, given), names["Layer"]()(*inputs), strict=True):
            numerics.close(torch.from_numpy(found), expected)
