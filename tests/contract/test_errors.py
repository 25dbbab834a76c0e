"""Refused calls: the exception and its message, eager and compiled, and that nothing was updated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.refusals import Refusal, refusals


def with_own_path() -> list[Refusal]:
    """Refusals that may differ in compiled code: those written by hand, and of each operator the first of a kind."""
    first = {(r.case.operator, r.kind or r.id): r for r in reversed(refusals())}
    return list(first.values())[::-1]


@pytest.mark.parametrize("refusal", refusals(), ids=str)
def test_eager(refusal: Refusal) -> None:
    """One line that names an argument that is wrong; the reader should not need the traceback."""
    inputs = refusal.inputs()
    before = pytree.tree_map_only(Tensor, Tensor.clone, inputs)
    with pytest.raises(refusal.error, match=refusal.message) as raised:
        refusal.case.overload(**inputs)
    message = str(raised.value)
    assert "\n" not in message
    names = refusal.case.declaration.fields if refusal.kind else refusal.change
    assert any(name in message for name in names) or "heads" in message, message
    for name in refusal.case.mutated:
        assert inputs[name].is_meta or torch.equal(inputs[name], before[name]), f"{name} was updated by a refused call"


@pytest.mark.parametrize("refusal", with_own_path(), ids=str)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(refusal: Refusal) -> None:
    """The message survives: the compiler wraps what a fake raises in an exception of its own."""
    overload, inputs = refusal.case.overload, refusal.inputs()

    @torch.compile(fullgraph=True, backend="eager")
    def call(inputs: dict[str, Any]) -> Any:
        return overload(**inputs)

    with pytest.raises(Exception, match=refusal.message.strip("^$")):
        call(inputs)
