"""torch.vmap over every operator: a mapped call is a call for each sample, and so is its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import numerics
from tests.cases import COMBINATION, EXPORT, INDUCTOR, Case, Inputs, cases
from tests.contract.helpers import differentiable, requiring

SAMPLES = 3
Dims = dict[str, "int | None"]


def floating(case: Case) -> list[str]:
    """The arguments that hold numbers."""
    return [name for name, x in case.inputs().items() if isinstance(x, Tensor) and x.is_floating_point()]


def samples_of(case: Case, dims: Dims) -> list[Inputs]:
    """The arguments of each sample; what is not mapped is the first's."""
    first, *others = (case.inputs(seed=seed) for seed in range(SAMPLES))
    return [first, *(first | {name: x[name] for name, dim in dims.items() if dim is not None} for x in others)]


def stacked(samples: Sequence[Inputs], dims: Dims) -> dict[str, Tensor]:
    """The mapped arguments with an axis of samples at their dims."""
    return {n: torch.stack([x[n] for x in samples], d) for n, d in dims.items() if d is not None}


def returned(outputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Without the outputs that were not asked for."""
    return tuple(y for y in outputs if y is not None)


def check(case: Case, dims: Dims, samples: Sequence[Inputs] | None = None) -> None:
    """A mapped call against a call for each sample, the pools that it updates included."""
    samples = samples or samples_of(case, dims)
    mapped = stacked(samples, dims)
    shared = {name: x for name, x in samples[0].items() if name not in mapped}

    def function(mapped: Inputs) -> tuple[Tensor, ...]:
        return returned(case.call(shared | mapped))

    found = torch.vmap(function, in_dims=({name: dims[name] for name in mapped},))(mapped)
    alone = [returned(case.call(x)) for x in samples]
    for y, expected in zip(found, zip(*alone, strict=True), strict=True):
        numerics.close(y, torch.stack(expected))


@pytest.mark.parametrize("case", cases(tag=COMBINATION), ids=str)
def test_all_are_mapped(case: Case) -> None:
    """At the first axis, and at a different one of each tensor; offsets and slots are shared."""
    names = floating(case)
    check(case, dict.fromkeys(names, 0))
    axes = {name: 1 + i % case.inputs()[name].dim() for i, name in enumerate(names)}
    check(case, axes)


def widest() -> list[Case]:
    """Of each operator, for every tensor that it can be given, a case which gives it, in few cases."""
    chosen = {}
    for case in cases():
        if case.tags & {COMBINATION, EXPORT}:
            for name in floating(case):
                best = chosen.setdefault((case.operator, name), case)
                if len(floating(case)) > len(floating(best)):
                    chosen[case.operator, name] = case
    return list({str(case): case for case in chosen.values()}.values())


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in widest() for name in floating(case)], ids=str)
def test_one_is_shared_or_one_is_mapped(case: Case, name: str) -> None:
    """Such as the decays and the sinks of the heads. A pool that others are not mapped with cannot be shared."""
    others = [other for other in floating(case) if other != name]
    pools = dict.fromkeys(case.mutated, 0)
    if name in pools:
        with pytest.raises(ValueError, match=rf"vmap: fla::\w+ updates {name} in place, which is not mapped over"):
            check(case, dict.fromkeys(others, 0))
    else:
        check(case, dict.fromkeys(others, 0))
    check(case, {name: 0} | pools)


def with_own_integers(case: Case) -> list[Inputs]:
    """Samples with offsets of their own, as many and as long in all, and with slots of their own."""
    samples = samples_of(case, dict.fromkeys(floating(case), 0))
    for i, sample in enumerate(samples):
        if "slots" in sample:
            sample["slots"] = sample["slots"].roll(i)
        if "offsets" in case.sizes:
            lengths = sample["cu_seqlens"].diff().roll(i)
            ends = lengths.cumsum(0).to(lengths.dtype)
            offsets = torch.cat([ends.new_zeros(1), ends])
            sample |= {name: offsets for name in ("cu_seqlens", "cu_seqlens_cpu") if name in case.given}
    return samples


@pytest.mark.parametrize(
    "case", [case for case in cases(tag=COMBINATION) if case.given & {"cu_seqlens", "slots"}], ids=str
)
def test_offsets_and_slots_are_mapped(case: Case) -> None:
    names = [*floating(case), *(case.given & {"cu_seqlens", "cu_seqlens_cpu", "slots"})]
    samples = with_own_integers(case)
    check(case, dict.fromkeys(names, 0), samples)
    pools = [*case.mutated, *(case.given & {"cu_seqlens", "cu_seqlens_cpu", "slots"})]
    shared = {name: x for name, x in samples[0].items() if name not in pools}
    check(case, dict.fromkeys(pools, 0), [sample | shared for sample in samples])


def loss(case: Case, inputs: Inputs) -> Tensor:
    """One number of all outputs."""
    return sum(y.cos().sum() for y in returned(case.call(inputs)))


def check_gradients(case: Case, dims: Dims) -> None:
    """The gradient of each sample's loss, also in what the samples share, against one call for each."""
    samples = samples_of(case, dims)
    mapped, constants = stacked(samples, dims), {n: x for n, x in samples[0].items() if n not in case.trained}
    trained = {name: mapped.get(name, samples[0][name]) for name in case.trained}
    in_dims: Mapping[str, int | None] = {name: dims.get(name) for name in trained}
    found = torch.vmap(torch.func.grad(lambda x: loss(case, constants | x)), in_dims=(in_dims,))(trained)
    for i, sample in enumerate(samples):
        inputs = requiring(sample, case.trained)
        expected = torch.autograd.grad(loss(case, inputs), [inputs[name] for name in case.trained])
        for name, y in zip(case.trained, expected, strict=True):
            numerics.close(found[name][i], y)


TRAINED = [case for case in widest() if case.trained]


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_gradients_of_each_sample(case: Case) -> None:
    check_gradients(case, dict.fromkeys(case.trained, 0))


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in TRAINED for name in case.trained], ids=str)
def test_gradients_of_each_sample_in_what_they_share(case: Case, name: str) -> None:
    check_gradients(case, {other: 0 for other in case.trained if other != name})


@pytest.mark.parametrize("case", [c for c in differentiable() if INDUCTOR in c.tags and "offsets" in c.sizes], ids=str)
def test_gradients_of_each_sample_of_packed_sequences(case: Case) -> None:
    check_gradients(case, dict.fromkeys(case.trained, 0))


@pytest.mark.parametrize("case", differentiable(EXPORT), ids=str)
def test_jacrev(case: Case) -> None:
    """A row of the Jacobian for each step and head, against a backward pass for each."""
    case = case.resized(B=1, T=3)
    inputs, first = case.inputs(), case.trained[0]

    def function(x: Tensor) -> Tensor:
        return case.call(inputs | {first: x})[0].sum(-1).flatten()

    found = torch.func.jacrev(function)(inputs[first])
    q = inputs[first].requires_grad_()
    for row, y in zip(found, function(q), strict=True):
        numerics.close(row, torch.autograd.grad(y, q, retain_graph=True)[0])


@pytest.mark.parametrize("case", differentiable(EXPORT), ids=str)
def test_batched_gradients_of_autograd(case: Case) -> None:
    """As torch.autograd.grad(..., is_grads_batched=True) makes them."""
    case = case.resized(T=5)
    inputs = requiring(case.inputs(torch.float64), case.trained)

    def function(*values: Any) -> tuple[Tensor, ...]:
        return returned(case.call(inputs | dict(zip(case.trained, values, strict=True))))

    trained = tuple(inputs[name] for name in case.trained)
    assert torch.autograd.gradcheck(function, trained, fast_mode=True, check_batched_grad=True)
