"""What surrounds a derivative: torch.func, checkpointing, autocast, modes, FLOP counts, and what has no derivative."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fla_ops
from tests.cases import COMBINATION, EXPORT, Case, cases, tensors
from tests.contract.helpers import (
    Recorder,
    assert_same_bits,
    cotangents,
    detached,
    differentiable,
    evaluate,
    labelled,
    operators,
    requiring,
)

TRAINED = pytest.mark.parametrize("case", differentiable(EXPORT), ids=str)
EVERY = pytest.mark.parametrize("case", cases(tag=EXPORT), ids=str)


def loss(case: Case, outputs: tuple[Any, ...], arriving: dict[str, Tensor | None]) -> Tensor:
    """The outputs as one number, each weighted by what arrives at it."""
    pairs = [(y, arriving[name]) for name, y in labelled(case.outputs, outputs) if y is not None]
    return sum((y.double() * weight.double()).sum() for y, weight in pairs)


@TRAINED
def test_torch_func_grad(case: Case) -> None:
    inputs = case.inputs()
    arriving = cotangents(detached(evaluate(case, inputs, wanted=())))
    expected = evaluate(case, inputs, arriving=arriving)
    trained = {name: inputs[name] for name in case.trained}
    found = torch.func.grad(lambda x: loss(case, case.call(inputs | x), arriving))(trained)
    assert_same_bits({f"d{n}": x for n, x in found.items()}, {f"d{n}": expected[f"d{n}"] for n in trained})


@TRAINED
def test_torch_func_vjp(case: Case) -> None:
    inputs = case.inputs()
    arriving = cotangents(detached(evaluate(case, inputs, wanted=())))
    expected = evaluate(case, inputs, arriving=arriving)
    trained = {name: inputs[name] for name in case.trained}
    _, pull = torch.func.vjp(lambda x: [y for y in case.call(inputs | x) if y is not None], trained)
    (found,) = pull([x for x in arriving.values() if x is not None])
    assert_same_bits({f"d{n}": x for n, x in found.items()}, {f"d{n}": expected[f"d{n}"] for n in trained})


@TRAINED
def test_checkpointing_gives_the_same_bits(case: Case) -> None:
    inputs = case.inputs()
    again = partial(checkpoint, case.call, use_reentrant=False)
    assert_same_bits(evaluate(case, inputs, again), evaluate(case, inputs))


@TRAINED
def test_selective_checkpointing_may_name_the_operator(case: Case) -> None:
    """Saving what the operator returns, the backward pass does not run it again."""
    inputs, ran = case.inputs(), []

    def policy(ctx: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if getattr(op, "namespace", "") != "fla" or op._opname.endswith("_backward"):
            return CheckpointPolicy.PREFER_RECOMPUTE
        ran.append(ctx.is_recompute)
        return CheckpointPolicy.MUST_SAVE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    again = partial(checkpoint, case.call, use_reentrant=False, context_fn=contexts)
    assert_same_bits(evaluate(case, inputs, again), evaluate(case, inputs))
    assert False in ran


@TRAINED
def test_selective_checkpointing_saves_what_sac_ops_lists(case: Case) -> None:
    """Each operator runs once, as without checkpointing."""
    inputs, saved = case.inputs(), fla_ops.sac_ops()
    contexts = partial(create_selective_checkpoint_contexts, saved)
    again = partial(checkpoint, case.call, use_reentrant=False, context_fn=contexts)
    with Recorder() as once:
        expected = evaluate(case, inputs)
    with Recorder() as recorder:
        assert_same_bits(evaluate(case, inputs, again), expected)
    found, wanted = ([call.name for call in r.calls if call.overload in saved] for r in (recorder, once))
    assert found == wanted


@TRAINED
def test_double_backward_is_refused(case: Case) -> None:
    inputs = requiring(case.inputs(), case.trained)
    trained = tensors([inputs[name] for name in case.trained])
    first = case.call(inputs)[0].square().sum()

    def twice() -> None:
        once = torch.autograd.grad(first, trained, create_graph=True, allow_unused=True)
        torch.autograd.grad(sum(g.sum() for g in once if g is not None), trained)

    with pytest.raises(NotImplementedError, match=r"double backward through fla::\w+ is not supported"):
        twice()


@TRAINED
def test_double_backward_through_transforms_is_refused(case: Case) -> None:
    inputs, first = case.inputs(), case.trained[0]

    def function(x: Tensor) -> Tensor:
        return case.call(inputs | {first: x})[0].square().sum()

    with pytest.raises(NotImplementedError, match=r"double backward through fla::\w+ is not supported"):
        torch.func.grad(lambda x: torch.func.grad(function)(x).sum())(inputs[first])


@EVERY
def test_forward_mode_is_refused(case: Case) -> None:
    inputs = case.inputs()
    name = next(n for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point())
    with forward_ad.dual_level():
        inputs[name] = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with pytest.raises(NotImplementedError, match=r"fla::\w+ has no forward-mode derivative"):
            case.overload(**inputs)


@EVERY
def test_jvp_is_refused(case: Case) -> None:
    inputs = case.inputs()
    name = next(n for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point())

    def function(x: Tensor) -> Tensor:
        return case.overload(**(inputs | {name: x}))

    with pytest.raises(NotImplementedError, match=r"fla::\w+ has no forward-mode derivative"):
        torch.func.jvp(function, (inputs[name],), (torch.ones_like(inputs[name]),))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("operator", operators("inference"), ids=lambda op: op.name)
@pytest.mark.usefixtures("fresh_compiler")
def test_gradient_of_an_inference_operator_is_refused(operator: fla_ops.Operator, compiled: bool) -> None:
    (case,) = cases(operator.name, EXPORT)
    inputs = case.inputs()
    floating = [n for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    for name in floating:
        wanting = requiring(inputs, [name])

        def function(wanting: Any = wanting) -> Any:
            return case.overload(**wanting)

        run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        with pytest.raises(Exception, match=rf"fla::{operator.name} is for inference and has no gradient"):
            run()
        with torch.no_grad():
            function(case.inputs())


@TRAINED
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_recording(case: Case, mode: Any) -> None:
    inputs = requiring(case.inputs(), case.trained)
    with mode():
        found = dict(labelled(case.outputs, case.call(inputs)))
    assert not any(y.requires_grad for y in found.values() if y is not None)
    assert_same_bits(found, evaluate(case, case.inputs(), wanted=()))


@EVERY
def test_inference_mode_tensors(case: Case) -> None:
    with torch.inference_mode():
        found = dict(labelled(case.outputs, case.call(case.inputs())))
    assert_same_bits(found, evaluate(case, case.inputs(), wanted=()))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_activations_only(case: Case, dtype: torch.dtype) -> None:
    """Gates and states keep their dtype and their values, and the kernel's own arithmetic is left alone."""
    inputs = case.inputs()
    with torch.autocast("cpu", dtype):
        found = evaluate(case, inputs)
    halves = {n: x.to(dtype) if n in ("q", "k", "v", "o", "x", "B", "C") else x for n, x in inputs.items()}
    expected = evaluate(case, halves)
    for name in case.trained:  # autocast's own cast back
        expected[f"d{name}"] = expected[f"d{name}"].to(inputs[name].dtype)
    assert case.outputs[0] in case.mutated or found[case.outputs[0]].dtype is dtype
    assert_same_bits(found, expected)


@EVERY
def test_autocast_leaves_float64_alone(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(case, inputs)
    assert_same_bits(found, evaluate(case, inputs))


@EVERY
def test_flops_are_counted_and_grow_with_the_work(case: Case) -> None:
    counts = []
    letter = "T" if "T" in case.sizes else "N"
    for times in (1, 2):
        inputs = case.resized(**{letter: 3 * times}).inputs()
        with FlopCounterMode(display=False) as forward:
            evaluate(case, inputs, wanted=())
        with FlopCounterMode(display=False) as both:
            evaluate(case, inputs)
        assert both.get_total_flops() >= forward.get_total_flops() * (2 if case.trained else 1)
        counts.append(forward.get_total_flops())
    assert counts[1] >= 2 * counts[0] > 0


@pytest.mark.parametrize("case", differentiable(COMBINATION), ids=str)
def test_backward_twice_through_a_kept_graph(case: Case) -> None:
    """The gradient reads what it saved and does not change it."""
    inputs = requiring(case.inputs(), case.trained)
    outputs = dict(labelled(case.outputs, case.call(inputs)))
    live = [y for y in outputs.values() if y is not None]
    upstream = [torch.ones_like(y) for y in live]
    trained = [inputs[name] for name in case.trained]
    first, second = (
        torch.autograd.grad(live, trained, upstream, retain_graph=True, allow_unused=True) for _ in range(2)
    )
    assert_same_bits(dict(enumerate(first)), dict(enumerate(second)))
