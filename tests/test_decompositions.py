"""Exported programs made of ATen calls: no operator of ours is left, and the numbers are the same at other sizes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram

import fla_ops
from tests import numerics
from tests.cases import EXPORT, Case, cases, results
from tests.contract.helpers import assert_close, evaluate, export, labelled, ours, tensors_of

PAGE = Path(__file__).parents[1] / "docs" / "exporting.md"
QUICK = (
    "chunk_simple_gla",
    "fused_recurrent_gsa",
    "parallel_attn",
    "attn_decoding_one_step",
    "gsa_step_",
    "simple_gla_step_",
)


def timed(case: Case, time: int) -> Case:
    """The case with so many steps, if it has any."""
    return case.resized(T=time) if "T" in case.sizes else case


def not_core(program: ExportedProgram) -> set[str]:
    """The calls of a program that are not core ATen."""
    targets = {node.target for node in program.graph.nodes if isinstance(node.target, OpOverload)}
    return {str(target) for target in targets if torch.Tag.core not in target.tags}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=str(c), marks=[pytest.mark.slow] * (c.operator not in QUICK)) for c in cases(tag=EXPORT)],
)
def test_a_program_becomes_aten_calls(case: Case) -> None:
    case = timed(case, 150)
    program = export(case).run_decompositions(fla_ops.decompositions())
    assert ours([program.graph_module]) == []
    assert not_core(program) <= {"aten._assert_async.msg"}
    more = {x: n for x, n in {"B": 3, "N": 7, "P": 12}.items() if x in case.sizes}
    inputs = case.inputs()
    shortest = (
        2 * inputs["every"] if "every" in inputs else 1
    )  # PyTorch takes a size that follows from another to be neither 0 nor 1
    for other in (case, timed(case.resized(**more), 230), timed(case, max(5, shortest)), timed(case, shortest)):
        check(program, other)


def check(program: ExportedProgram, case: Case) -> None:
    """The program returns, and leaves in its pools, what the operator does."""
    inputs = case.inputs(seed=1)
    given = {name: x.clone() for name, x in tensors_of(inputs).items()}
    found = program.module()(given)
    outputs = (*results(found), *(given[name] for name in case.mutated))
    assert_close(dict(labelled(case.outputs, outputs)), evaluate(case, inputs, wanted=()))


PACKED = ("chunk_simple_gla", "parallel_simple_gla", "chunk_gsa", "fused_recurrent_gsa", "parallel_attn")
POOLS = ("packed-with-empty-and-one-step", "packed-value-first", "value-first+slots")


STATES = ("simple_gla_states", "gsa_states")


def is_special(case: Case) -> bool:
    """A pack, a pool in the other layout, or states at given steps."""
    if case.operator in STATES:
        return case.id in ("packed-with-empty-and-one-step", "stops", "packed-stops")
    return case.id in POOLS if case.mutated else case.operator in PACKED and "packed" in case.id


@pytest.mark.slow
@pytest.mark.parametrize("case", list(filter(is_special, cases())), ids=str)
def test_packs_and_other_layouts_become_aten_calls(case: Case) -> None:
    program = export(case).run_decompositions(fla_ops.decompositions())
    assert not_core(program) <= {"aten._assert_async.msg"}
    check(program, case)


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
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx")
    q, k, v = torch.randn(3, 5, 4, 16).unbind()
    inputs = (q, k, v, torch.rand(5, 4, 8), -torch.rand(5, 4, 8), torch.randn(5, 4, 16, 8), torch.randn(5, 4, 8, 16))
    given = {x.name: y.numpy() for x, y in zip(session.get_inputs(), inputs, strict=True)}
    for found, expected in zip(session.run(None, given), names["Step"]()(*inputs), strict=True):
        numerics.close(torch.from_numpy(found), expected)
