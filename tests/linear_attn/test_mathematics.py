"""The mathematics of linear_attn: weights that sum to one, pairs that resume, float16, the pinned graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import fla_ops
from tests import numerics
from tests.cases import EXPORT, cases
from tests.contract.helpers import INTERPRETED, export, listing

FORMS = ("chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn", "linear_attn")
B, T, HK, H, K, V = 2, 37, 3, 6, 10, 7
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal, in float64: what is left over is the difference between two formulas."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def positive(*shape: int, seed: int = 0) -> Tensor:
    """What a feature map gives."""
    return torch.nn.functional.elu(draw(*shape, seed=seed)) + 1


def inputs(time: int = T, heads: int = H, key_heads: int = HK) -> dict[str, Any]:
    """q, k and v."""
    return {
        "q": positive(B, time, key_heads, K, seed=1),
        "k": positive(B, time, key_heads, K, seed=2),
        "v": draw(B, time, heads, V, seed=3),
    }


def pair(sequences: int = B) -> tuple[Tensor, Tensor]:
    """A state to start from."""
    return draw(sequences, H, K, V, seed=5), positive(sequences, 1, H, K, seed=6)


def run(form: str, arguments: dict[str, Any], normalize: bool = True) -> list[Tensor]:
    """The output, then the parts of the state that there are; chunks of 16 steps where the form has them."""
    if form != "fused_recurrent_linear_attn":
        arguments = {"chunk_size": 16} | arguments
    o, state = getattr(fla_ops, form)(**arguments, normalize=normalize)
    return [o, *(state if isinstance(state, tuple) else () if state is None else (state,))]


def leaves_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values, each wanting a gradient."""
    return {
        n: tuple(part.detach().requires_grad_() for part in x) if isinstance(x, tuple) else x.detach().requires_grad_()
        for n, x in arguments.items()
    }


def tensors(arguments: dict[str, Any]) -> list[Tensor]:
    """The tensors, parts of a pair included."""
    return [y for x in arguments.values() for y in (x if isinstance(x, tuple) else (x,)) if isinstance(y, Tensor)]


def with_gradients(form: str, arguments: dict[str, Any], normalize: bool = True, **options: Any) -> list[Tensor]:
    """Outputs, then the gradient of every input, of a sum with fixed weights."""
    given = leaves_of(arguments)
    outputs = run(form, given | options, normalize)
    weights = [draw(*y.shape, seed=9) for y in outputs]
    return outputs + list(torch.autograd.grad(outputs, tensors(given), weights))


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    """The same, but for rounding."""
    for x, y in zip(found, expected, strict=True):
        numerics.close(x, y)


@EVERY_FORM
def test_normalised_weights_are_those_of_the_quadratic_form(form: str) -> None:
    arguments = inputs()
    q, k = (arguments[n].repeat_interleave(H // HK, 2) for n in ("q", "k"))
    scores = K**-0.5 * torch.einsum("bihk,bjhk->bhij", q, k).tril()
    expected = torch.einsum("bhij,bjhv->bihv", scores / (scores.sum(-1, keepdim=True) + 1e-10), arguments["v"])
    assert_equal(run(form, arguments), [expected])


@EVERY_FORM
def test_a_constant_value_comes_back(form: str) -> None:
    """Weights sum to one; then nothing depends on q and k, so the denominator's gradient cancels the numerator's."""
    given = leaves_of(inputs() | {"v": torch.ones(B, T, H, V, dtype=torch.float64)})
    (o,) = run(form, given)
    numerics.close(o, torch.ones_like(o), torch.float32)  # but for the epsilon, which float32 does not see
    for gradient in torch.autograd.grad(o, [given["q"], given["k"]], draw(*o.shape)):
        numerics.close(gradient, torch.zeros_like(gradient), torch.float32)


@EVERY_FORM
def test_the_scale_cancels(form: str) -> None:
    arguments = {n: x.float() for n, x in inputs().items()}  # in which the epsilon is lost
    assert_equal(run(form, arguments | {"scale": 3.0}), run(form, arguments))
    assert_equal(run(form, arguments | {"scale": 3.0}, False), [3.0 * K**0.5 * run(form, arguments, False)[0]])


@EVERY_FORM
def test_without_division_it_is_simple_gla_without_decay(form: str) -> None:
    arguments = inputs() | {"initial_state": pair()[0]}
    expected = fla_ops.chunk_simple_gla(**arguments, output_final_state=True)
    assert_equal(run(form, arguments | {"output_final_state": True}, False), list(expected))


@pytest.mark.parametrize("form", FORMS[1:])
def test_forms_agree_with_the_chunk_form(form: str) -> None:
    arguments, options = inputs() | {"initial_state": pair()}, {"output_final_state": True}
    expected = with_gradients("chunk_linear_attn", arguments, **options)
    assert_equal(with_gradients(form, arguments, **options), expected)


@EVERY_FORM
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "not-normalised"])
def test_heads_that_share_a_key_are_heads_with_equal_keys(form: str, normalize: bool) -> None:
    """Each value head has a sum of its own to start from."""
    shared = inputs() | {"initial_state": pair() if normalize else pair()[0]}
    own = shared | {n: shared[n].repeat_interleave(H // HK, 2) for n in ("q", "k")}
    o, dq, dk, *others = with_gradients(form, own, normalize)
    groups = [x.unflatten(2, (HK, -1)).sum(3) for x in (dq, dk)]
    assert_equal(with_gradients(form, shared, normalize), [o, *groups, *others])


@EVERY_FORM
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "not-normalised"])
@pytest.mark.parametrize("split", [0, 1, 16, 20, T], ids=lambda n: f"after-{n}-steps")
def test_resuming_equals_not_having_stopped(form: str, split: int, normalize: bool) -> None:
    """Gradients too: they flow back through both parts of the state from the second part into the first."""
    arguments = inputs() | {"initial_state": pair() if normalize else pair()[0]}
    whole = with_gradients(form, arguments, normalize, output_final_state=True)

    leaves = leaves_of(arguments)
    first = {n: x if n == "initial_state" else x[:, :split] for n, x in leaves.items()}
    o1, *state = run(form, first | {"output_final_state": True}, normalize)
    second = {n: x[:, split:] for n, x in leaves.items() if n != "initial_state"}
    second["initial_state"] = tuple(state) if normalize else state[0]
    o2, *final = run(form, second | {"output_final_state": True}, normalize)
    outputs = [torch.cat([o1, o2], 1), *final]
    weights = [draw(*y.shape, seed=9) for y in outputs]
    assert_equal([*outputs, *torch.autograd.grad(outputs, tensors(leaves), weights)], whole)


@pytest.mark.parametrize("split", [0, 1, 20, T], ids=lambda n: f"before-step-{n}")
def test_resuming_backwards_equals_not_having_stopped(split: int) -> None:
    form, options = "fused_recurrent_linear_attn", {"output_final_state": True, "reverse": True}
    arguments = inputs() | {"initial_state": pair()}
    whole = with_gradients(form, arguments, **options)
    leaves = leaves_of(arguments)
    late = {n: x if n == "initial_state" else x[:, split:] for n, x in leaves.items()}
    o2, *state = run(form, late | options)
    early = {n: x[:, :split] for n, x in leaves.items() if n != "initial_state"} | {"initial_state": tuple(state)}
    o1, *final = run(form, early | options)
    outputs = [torch.cat([o1, o2], 1), *final]
    weights = [draw(*y.shape, seed=9) for y in outputs]
    assert_equal([*outputs, *torch.autograd.grad(outputs, tensors(leaves), weights)], whole)


def test_reversed_time_is_time_backwards() -> None:
    arguments = inputs() | {"initial_state": pair(), "output_final_state": True}
    flipped = {n: x.flip(1) if n in "qkv" else x for n, x in arguments.items()}
    o, kv, z = run("fused_recurrent_linear_attn", flipped)
    assert_equal(run("fused_recurrent_linear_attn", arguments | {"reverse": True}), [o.flip(1), kv, z])


@EVERY_FORM
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "not-normalised"])
def test_no_final_state_is_none(form: str, normalize: bool) -> None:
    assert getattr(fla_ops, form)(**inputs(), normalize=normalize)[1] is None


def test_only_the_recurrent_form_does_not_normalise_by_default() -> None:
    arguments = inputs()
    for form in FORMS:
        o, _ = getattr(fla_ops, form)(**arguments)
        numerics.close(o, run(form, arguments, normalize=form != "fused_recurrent_linear_attn")[0])


@EVERY_FORM
def test_state_of_an_empty_sequence_passes_through(form: str) -> None:
    packed = {n: x[:1] for n, x in inputs().items()} | {"cu_seqlens": torch.tensor([0, 5, 5, T])}
    start = tuple(x.requires_grad_() for x in pair(3))
    _, kv, z = run(form, packed | {"initial_state": start, "output_final_state": True})
    assert torch.equal(kv[1], start[0][1])
    assert torch.equal(z[1], start[1][1])
    dkv, dz = torch.autograd.grad(kv.sum() + z.sum(), start)
    assert torch.equal(dkv[1], torch.ones_like(dkv[1]))
    assert torch.equal(dz[1], torch.ones_like(dz[1]))


@EVERY_FORM
def test_states_of_the_wrong_form_are_refused(form: str) -> None:
    function, arguments, (kv, z) = getattr(fla_ops, form), inputs(), pair()
    with pytest.raises(ValueError, match=r"initial_state must be a pair \(kv .*\), got no initial_z"):
        function(**arguments, initial_state=kv, normalize=True)
    with pytest.raises(ValueError, match=r"initial_state must be kv .* alone, got a pair"):
        function(**arguments, initial_state=(kv, z), normalize=False)
    with pytest.raises(ValueError, match=r"a pair \(kv, z .*\), got 3 parts"):
        function(**arguments, initial_state=(kv, z, z), normalize=True)


def test_normalize_output_divides_by_the_running_sum() -> None:
    q, k, o = positive(B, T, HK, K, seed=1), positive(B, T, HK, K, seed=2), draw(B, T, H, V)
    sums = (q * k.cumsum(1)).sum(-1, keepdim=True).repeat_interleave(H // HK, 2)
    numerics.close(fla_ops.normalize_output(q, k, o), o / (sums + 1e-10))
    quotient, z = fla_ops.normalize_output(q, k, o, scale=None, output_final_z=True)
    numerics.close(quotient, o / (K**-0.5 * sums + 1e-10))
    numerics.close(z, k.sum(1, keepdim=True).repeat_interleave(H // HK, 2))


@EVERY_FORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_running_sum_keeps_growing_in_half_precision(form: str, dtype: torch.dtype) -> None:
    """A sum of ones in bfloat16 ends at 256, in float16 at 2048; an average of ones must stay one."""
    ones = torch.ones(1, 3000, 1, 1, dtype=dtype)
    o, _ = getattr(fla_ops, form)(ones, ones, ones, normalize=True)
    assert (o.float() - 1).abs().max() <= 2 * torch.finfo(dtype).eps


def test_a_denominator_of_zero_is_the_epsilon() -> None:
    """Queries that see nothing: 0 / 1e-10."""
    q, k, v = torch.zeros(1, 5, 1, 4), torch.zeros(1, 5, 1, 4), torch.ones(1, 5, 1, 3)
    o, _ = fla_ops.chunk_linear_attn(q, k, v)
    assert torch.equal(o, torch.zeros_like(o))


@pytest.mark.parametrize("autocast", [False, True], ids=["float16-inputs", "float16-by-autocast"])
@EVERY_FORM
def test_float16_does_not_overflow_before_the_division(form: str, autocast: bool) -> None:
    """The read-out before the division passes 65504 after a dozen steps; the average it becomes is 2."""
    dtype = torch.float32 if autocast else torch.float16
    q, k = (torch.full((1, 64, 1, 16), 40.0, dtype=dtype) for _ in range(2))
    v = torch.full((1, 64, 1, 2), 2.0, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        o, _ = getattr(fla_ops, form)(q, k, v, normalize=True)
    assert o.dtype is torch.float16
    numerics.close(o.float(), torch.full((1, 64, 1, 2), 2.0), torch.float16)
    (dv,) = torch.autograd.grad(o.float().sum(), v)
    assert dv.dtype is dtype
    numerics.close(dv[0, 0, 0].float(), (1 / torch.arange(1.0, 65)).sum().expand(2), torch.float16)


@EVERY_FORM
def test_autocast_casts_activations_and_no_state(form: str) -> None:
    arguments = {n: x.float() for n, x in inputs().items()}
    start = tuple(x.float() for x in pair())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, kv, z = run(form, arguments | {"initial_state": start, "output_final_state": True})
    assert (o.dtype, kv.dtype, z.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    half = {n: x.bfloat16() for n, x in arguments.items()}
    expected = run(form, half | {"initial_state": start, "output_final_state": True})
    assert all(torch.equal(x, y) for x, y in zip((o, kv, z), expected, strict=True))


@pytest.mark.parametrize("mode", ["chunk", "fused_chunk", "fused_recurrent"])
def test_dispatcher_runs_the_named_form(mode: str) -> None:
    found = fla_ops.linear_attn(**inputs(), chunk_size=16, mode=mode)
    assert torch.equal(found[0], run(f"{mode}_linear_attn", inputs())[0])


def test_explain_names_the_form_and_the_refusals() -> None:
    choice = fla_ops.explain(fla_ops.linear_attn, **inputs(), initial_state=pair(), reverse=True)
    assert choice.form.signature.name == "fused_recurrent_linear_attn"
    assert set(choice.refused) == {"chunk", "fused_chunk"}


@pytest.mark.parametrize(
    ("offsets", "reverse", "initial"),
    [
        pytest.param(None, False, True, id="dense-resumed"),
        pytest.param([0, 0, 65, 66, 130], True, False, id="packed-backwards", marks=pytest.mark.slow),
        pytest.param([0, 0, 65, 66, 130], False, True, id="packed-resumed", marks=pytest.mark.slow),
    ],
)
def test_the_traced_body_is_the_operator(offsets: list[int] | None, reverse: bool, initial: bool) -> None:
    batch, sequences = (2, 2) if offsets is None else (1, 4)
    q, k, o = positive(batch, 130, HK, K, seed=1), positive(batch, 130, HK, K, seed=2), draw(batch, 130, H, V)
    z = positive(sequences, 1, H, K) if initial else None
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    arriving = (draw(*o.shape), draw(sequences, 1, H, K))
    inputs = (q, k, o, *((z,) if initial else ()))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors[: len(inputs)]]
        given = dict(zip(("q", "k", "o", "initial_z"), leaves, strict=False))
        settings = {"scale": 0.3, "output_final_z": True, "reverse": reverse, "cu_seqlens": cu_seqlens}
        outputs = fla_ops.normalize_output(**given, **settings)
        return *outputs, *torch.autograd.grad(outputs, leaves, tensors[len(inputs) :])

    with fla_ops.inlining():
        graph = make_fx(dispatch_functionalize(run), tracing_mode="symbolic", _allow_non_fake_inputs=True)(
            *inputs, *arriving
        )
    assert not any("fla" in str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    assert_equal(list(graph(*inputs, *arriving)), list(run(*inputs, *arriving)))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_bodies_give_the_operators_numbers() -> None:
    arguments = {n: x.float() for n, x in inputs().items()}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fla_ops.linear_attn(q * 1.5, k, v, mode="chunk")[0]

    given, leaves = leaves_of(arguments), leaves_of(arguments)
    expected, _ = fla_ops.linear_attn(leaves["q"] * 1.5, leaves["k"], leaves["v"], mode="chunk")
    weights = draw(*expected.shape).float()
    with fla_ops.inlining():
        o = layer(**given)
        found = torch.autograd.grad(o, list(given.values()), weights)
    assert_equal([o, *found], [expected, *torch.autograd.grad(expected, list(leaves.values()), weights)])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels cannot be traced")
def test_on_a_gpu_the_graph_holds_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.aot import stub_driver  # needs Triton

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with stub_driver(), FakeTensorMode(allow_non_fake_inputs=True), fla_ops.inlining():
        q, k, o = (torch.randn(2, 100, heads, 16, device="cuda") for heads in (2, 2, 4))
        graph = make_fx(dispatch_functionalize(fla_ops.normalize_output))(q, k, o)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count("triton_kernel_wrapper_functional") == 3  # sums, sums before, division
    assert not any("fla" in target for target in targets)


def test_a_trace_shows_what_was_chosen() -> None:
    (case,) = cases("linear_attn", EXPORT)
    assert_expected_inline(
        listing(export(case).run_decompositions()),
        """\
x_q
x_k
x_v
x_initial_state
x_initial_z
chunk_simple_gla = fla.chunk_simple_gla(x_q, x_k, x_v, None, None, 0.3, x_initial_state, True, False, None, None, 16)
getitem = getitem(chunk_simple_gla, 0)
getitem_1 = getitem(chunk_simple_gla, 1)
normalize_output = fla.normalize_output(x_q, x_k, getitem, 0.3, x_initial_z, True)
getitem_2 = getitem(normalize_output, 0)
getitem_3 = getitem(normalize_output, 1)
output = output((getitem_2, getitem_1, getitem_3))""",
    )


def test_exported_divide_step() -> None:
    (case,) = cases("normalize_output", EXPORT)
    assert_expected_inline(
        listing(export(case)),
        """\
x_q
x_k
x_o
x_initial_z
normalize_output = fla.normalize_output(x_q, x_k, x_o, 0.3, x_initial_z, True)
getitem = getitem(normalize_output, 0)
getitem_1 = getitem(normalize_output, 1)
output = output((getitem, getitem_1))""",
    )
