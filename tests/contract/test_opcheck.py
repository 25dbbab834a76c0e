"""torch.library.opcheck, and fakes that agree with the kernel in every particular, for each set of optional inputs."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from tests.cases import COMBINATION, EXPORT, Case, cases
from tests.contract.helpers import Call, is_backward, is_typical, params, parts, requiring, with_parts

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(("case", "device"), params(cases(tag=COMBINATION), quick=is_typical))
def test_opcheck(case: Case, device: str) -> None:
    inputs = requiring(case.inputs(device=device), case.trained)
    torch.library.opcheck(case.overload, (), inputs, test_utils=CHECKS)


@pytest.mark.parametrize(("case", "device"), params(with_parts(COMBINATION), quick=is_typical))
def test_opcheck_of_parts(case: Case, device: str) -> None:
    """Backward operators, and others that people do not call, with the arguments that they get."""
    calls = parts(case, case.inputs(device=device))
    assert calls
    for call in calls:
        torch.library.opcheck(call.overload, call.args, call.kwargs, test_utils=CHECKS)


def facts(x: Any) -> Any:
    """What a fake must know of an output."""
    return (tuple(x.shape), x.dtype, x.stride(), x.device) if isinstance(x, Tensor) else x


def check_fake(call: Call) -> None:
    """Run the operator on fake copies of the arguments: the outputs must look like the real ones."""
    mode = FakeTensorMode()
    args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (call.args, call.kwargs))
    with mode:
        fake = call.overload(*args, **kwargs)
    assert pytree.tree_map(facts, fake) == pytree.tree_map(facts, call.outputs)


@pytest.mark.parametrize(("case", "device"), params(cases()))
def test_fake_equals_real(case: Case, device: str) -> None:
    inputs = case.inputs(torch.bfloat16, device)
    real = {name: x.clone() if name in case.mutated else x for name, x in inputs.items()}
    check_fake(Call(case.overload, (), inputs, case.overload(**real)))


@pytest.mark.parametrize(
    ("case", "device"), params(with_parts(EXPORT, "_backward") + with_parts(COMBINATION, "_backward"))
)
def test_fake_equals_real_backward(case: Case, device: str) -> None:
    """Subsets of gradients, of the arguments that are given, in half precision beside wide gates and states: every one
    where all arguments are given, else none, each, and all.
    """
    (call,) = [c for c in parts(case, case.inputs(torch.bfloat16, device)) if is_backward(c.name)]
    *args, mask = call.args
    assert mask == [y is not None for y in call.outputs]
    given = [i for i, wanted in enumerate(mask) if wanted]
    for chosen in product([False, True], repeat=len(given)):
        if EXPORT not in case.tags and 1 < sum(chosen) < len(given):
            continue
        some = [False] * len(mask)
        for i, wanted in zip(given, chosen, strict=True):
            some[i] = wanted
        outputs = call.overload(*args, some)
        assert [y is not None for y in outputs] == some
        check_fake(Call(call.overload, (*args, some), {}, outputs))


@pytest.mark.parametrize("case", cases(tag=EXPORT), ids=str)
def test_inputs_stay_as_they_are(case: Case) -> None:
    inputs = case.inputs()
    before = pytree.tree_map_only(Tensor, Tensor.clone, inputs)
    case.overload(**inputs)
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            assert torch.equal(x, before[name]) is (name not in case.mutated), name
