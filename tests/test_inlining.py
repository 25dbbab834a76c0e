"""Bodies in place of operators: numbers, packages that need no registration, and what a GPU's graph would hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import fla_ops
from fla_ops.common.cpu import sequences
from tests import numerics
from tests.aot import stub_driver

AUTO = torch.export.Dim.AUTO
SLOW = pytest.mark.slow  # tracing takes seconds


def activations(batch: int, time: int, device: str = "cpu") -> list[torch.Tensor]:
    """q, k, v, g with two value heads to a query head."""
    shapes = ((batch, time, 2, 10), (batch, time, 2, 10), (batch, time, 4, 7))
    return [*(torch.randn(shape, device=device) for shape in shapes), -torch.rand(batch, time, 4, device=device)]


class Packed(torch.nn.Module):
    """Sequences laid end to end, which go on from states."""

    def forward(self, q, k, v, g, states, offsets):
        return fla_ops.simple_gla(q * 1.5, k, v, g, initial_state=states, output_final_state=True, cu_seqlens=offsets)


def packed(offsets: list[int]) -> tuple:
    return (*activations(1, offsets[-1]), torch.randn(len(offsets) - 1, 4, 10, 7), torch.tensor(offsets))


LOADER = """
import sys, torch
package, numbers = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
inputs, expected = torch.load(numbers)
for got, wanted in zip(run(*inputs), expected, strict=True):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
inputs[-1][-1] -= 1
try:
    run(*inputs)
except RuntimeError as error:
    assert "cu_seqlens must end at T" in str(error), error
else:
    raise AssertionError("wrong offsets went unnoticed")
assert "fla_ops" not in sys.modules and not hasattr(torch.ops.fla, "chunk_simple_gla")
"""


def test_a_package_needs_no_registration(tmp_path: Path) -> None:
    dynamic = (*({1: AUTO},) * 4, {0: AUTO}, {0: AUTO})
    program = torch.export.export(Packed(), packed([0, 40, 90]), dynamic_shapes=dynamic)
    with fla_ops.inlining(), torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    inputs = packed([0, 0, 65, 66, 300])
    torch.save((inputs, Packed()(*inputs)), tmp_path / "numbers.pt")
    subprocess.run([sys.executable, "-c", LOADER, package, str(tmp_path / "numbers.pt")], check=True)


class Steps(torch.nn.Module):
    """A decode step of each kind of state."""

    def forward(self, q, k, v, g, states, slots_k, slots_v, offsets):
        q, k, v, g = (x[:, 0] for x in (q, k, v, g))
        o = fla_ops.simple_gla_step_(q, k, v, g=g, state=states)
        s = torch.sigmoid(q[..., :6])
        read = fla_ops.gsa_step_(q, k, v[:, ::2], s, -s, slots_k, slots_v)
        keys, values = k.repeat(3, 1, 1)[None], v[:, ::2].repeat(3, 1, 1)[None]
        seen = fla_ops.attn_decoding_one_step(q[None], keys, values, None, None, offsets)
        return o, read, seen, states, slots_k, slots_v


def decoding(sequences: int) -> tuple:
    pools = ((4, 10, 7), (2, 10, 6), (2, 6, 7))
    states = (torch.randn(sequences, *shape) for shape in pools)
    return (*activations(sequences, 1), *states, torch.arange(0, 3 * sequences + 1, 3))


STEPPER = """
import sys, torch
package, numbers = sys.argv[1:]
inputs, expected = torch.load(numbers)
for got, wanted in zip(torch._inductor.aoti_load_package(package)(*inputs), expected, strict=True):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(inputs[4:7], expected[3:], rtol=1e-4, atol=1e-5)
assert "fla_ops" not in sys.modules and not hasattr(torch.ops.fla, "gsa_step_")
"""


@SLOW
def test_a_package_of_decode_steps_needs_no_registration(tmp_path: Path) -> None:
    program = torch.export.export(Steps(), decoding(3), dynamic_shapes=({0: AUTO},) * 8)
    with fla_ops.inlining(), torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "steps.pt2"))
    inputs = decoding(5)
    updated = [x.clone() for x in inputs]
    torch.save((inputs, Steps()(*updated)), tmp_path / "numbers.pt")
    subprocess.run([sys.executable, "-c", STEPPER, package, str(tmp_path / "numbers.pt")], check=True)


def test_compiled_bodies_give_the_operators_numbers() -> None:
    inputs = [x.requires_grad_() for x in activations(2, 150)]

    def loss(*args):
        o, state = fla_ops.simple_gla(*args, output_final_state=True)
        return o.sin().sum() + state.cos().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch._dynamo.reset()
    for x in inputs:
        torch._dynamo.mark_dynamic(x, (0, 1))
    with fla_ops.inlining():
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*inputs), inputs)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def with_gradients(form: str, options: dict, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of a form, then the gradient of every floating input, of a sum with fixed weights."""
    inputs = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in given.items()}
    outputs = [y for y in getattr(fla_ops, form)(**inputs, **options) if y is not None]
    weights = [torch.linspace(-1, 2, y.shape[-1], dtype=y.dtype).expand_as(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [x for x in inputs.values() if x.requires_grad], weights)]


def calls(form: str, gate: str, offsets: list[int] | None) -> dict[str, torch.Tensor]:
    """The tensors of a call in float64, whose eager operator is the ATen body too."""
    q, k, v, g = (x.double() for x in activations(2 if offsets is None else 1, 130))
    given = {"q": q, "k": k, "v": v}
    if gate in ("step", "resets"):
        given["g"] = g
    if gate == "resets":
        g[:, ::7], g[:, 3::11] = -torch.inf, -1e4
    if gate == "head":
        given["g_gamma"] = torch.tensor([-0.1, -1e4, -2.0, 0.0], dtype=torch.float64)
    if form != "parallel_simple_gla":
        given["initial_state"] = torch.randn(2 if offsets is None else 4, 4, 10, 7, dtype=torch.float64)
    return given if offsets is None else given | {"cu_seqlens": torch.tensor(offsets)}


EVERY_FORM = pytest.mark.parametrize(
    ("form", "options"),
    [
        pytest.param("chunk_simple_gla", {"chunk_size": 16, "output_final_state": True}, id="chunk"),
        pytest.param("fused_recurrent_simple_gla", {"output_final_state": True}, id="recurrent"),
        pytest.param(
            "fused_recurrent_simple_gla", {"output_final_state": True, "reverse": True}, id="recurrent-reverse"
        ),
        pytest.param("parallel_simple_gla", {}, id="parallel"),
        pytest.param("parallel_simple_gla", {"output_attentions": True}, id="parallel-with-weights"),
    ],
)


@EVERY_FORM
@pytest.mark.parametrize("offsets", [None, [0, 0, 33, 34, 130]], ids=["dense", "packed-with-empty-and-single"])
@pytest.mark.parametrize("gate", ["none", "step", "head", "resets"])
def test_all_sequences_at_once_are_each_on_its_own(
    form: str, options: dict, gate: str, offsets: list[int] | None
) -> None:
    given = calls(form, gate, offsets)
    expected = with_gradients(form, options, given)
    with mock.patch.object(sequences, "is_traced", return_value=True):
        found = with_gradients(form, options, given)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("poisoned", ["q", "k", "v", "g", "initial_state"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reverse"])
def test_all_sequences_at_once_keep_their_nan(poisoned: str, reverse: bool) -> None:
    given = calls("chunk_simple_gla", "step", [0, 0, 33, 34, 130])
    options = {"output_final_state": True, "reverse": reverse, "chunk_size": 16}
    bad = {name: x.clone() for name, x in given.items()}
    if poisoned == "initial_state":
        bad[poisoned][1] = torch.nan
    else:
        bad[poisoned][:, 20:22] = torch.nan
    with mock.patch.object(sequences, "is_traced", return_value=True):
        expected, found = (with_gradients("chunk_simple_gla", options, x) for x in (given, bad))
    for got, wanted in zip(found, expected, strict=True):
        others = (slice(None), slice(33, None)) if got.shape[0] == 1 else (slice(2, None),)
        assert torch.equal(got[others], wanted[others])
    assert found[0][:, :33].isnan().any()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        pytest.param("fused_chunk_simple_gla", {"chunk_size": 16, "output_final_state": True}, id="fused_chunk"),
        pytest.param("fused_recurrent_simple_gla", {"reverse": True}, id="recurrent-reverse", marks=SLOW),
        pytest.param("parallel_simple_gla", {"output_attentions": True}, id="parallel-with-weights", marks=SLOW),
    ],
)
def test_a_graph_of_symbolic_sizes_holds_the_body(form: str, options: dict) -> None:
    given = calls(form, "step", [0, 0, 33, 34, 130])

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return with_gradients(form, options, dict(zip(given, tensors, strict=True)))

    with fla_ops.inlining():
        graph = make_fx(dispatch_functionalize(run), tracing_mode="symbolic")(*given.values())
    assert not any("fla" in str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    for got, wanted in zip(graph(*given.values()), run(*given.values()), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("slots", [None, [2, -1, 0], [-1, -1, -1]], ids=["every-row", "pool-with-padding", "no-row"])
def test_the_traced_step_updates_its_pool(slots: list[int] | None) -> None:
    q, k, v, g = (x[:, 0] for x in activations(3, 1))
    pool = torch.randn(3 if slots is None else 5, 4, 10, 7)
    index = () if slots is None else (torch.tensor(slots),)

    def step(pool: torch.Tensor, *index: torch.Tensor) -> torch.Tensor:
        return fla_ops.simple_gla_step_(q, k, v, pool, g, slots=index[0] if index else None)

    found, expected = pool.clone(), pool.clone()
    torch._dynamo.reset()
    with fla_ops.inlining(), torch.no_grad():
        o = torch.compile(step, fullgraph=True, backend="aot_eager")(found, *index)
    numerics.close(o, step(expected, *index))
    numerics.close(found, expected)


@pytest.mark.parametrize(
    "form", [pytest.param("fused_recurrent_simple_gla", marks=SLOW), pytest.param("parallel_simple_gla")]
)
def test_one_compiled_body_serves_every_length_from_three_chunks_on(form: str) -> None:
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return getattr(fla_ops, form)(q, k, v, g)[0]

    torch._dynamo.reset()
    with fla_ops.inlining(), torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for time in (150, 200, 300):
            inputs = activations(2, time)
            with torch.compiler.set_stance("default" if time == 150 else "fail_on_recompile"):
                numerics.close(compiled(*inputs), layer(*inputs))


def test_on_a_gpu_the_graph_holds_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index=None: (9, 0))
    with stub_driver(), FakeTensorMode(allow_non_fake_inputs=True), fla_ops.inlining():
        graph = make_fx(dispatch_functionalize(lambda *args: fla_ops.chunk_simple_gla(*args)[0]))(
            *activations(2, 100, "cuda")
        )
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count("triton_kernel_wrapper_functional") == 2
    assert not any("fla" in target for target in targets)
