"""Refused calls: the exception and its message, eager and compiled, and that nothing was updated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.cases import Refusal, refusals

REFUSED = pytest.mark.parametrize("refusal", refusals(), ids=str)


@REFUSED
def test_eager(refusal: Refusal) -> None:
    inputs = refusal.inputs()
    before = pytree.tree_map_only(Tensor, Tensor.clone, inputs)
    with pytest.raises(refusal.error, match=refusal.message):
        refusal.case.overload(**inputs)
    for name in refusal.case.mutated:
        assert inputs[name].is_meta or torch.equal(inputs[name], before[name]), f"{name} was updated by a refused call"


@REFUSED
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(refusal: Refusal) -> None:
    """The message survives: the compiler wraps what a fake raises in an exception of its own."""
    overload, inputs = refusal.case.overload, refusal.inputs()

    @torch.compile(fullgraph=True, backend="eager")
    def call(inputs: dict[str, Any]) -> Any:
        return overload(**inputs)

    with pytest.raises(Exception, match=refusal.message):
        call(inputs)


@REFUSED
def test_message_names_what_is_wrong(refusal: Refusal) -> None:
    """One line that names an argument that was changed; the reader should not need the traceback."""
    with pytest.raises(refusal.error) as raised:
        refusal.case.overload(**refusal.inputs())
    message = str(raised.value)
    assert "\n" not in message
    assert any(name in message for name in refusal.change) or "like q" in message or "heads" in message, message
