"""Bodies in place of operators: numbers, packages that need no registration, and what a GPU's graph would hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import fla_ops
from fla_ops.simple_gla.cpu import traced
from tests.aot import stub_driver

AUTO = torch.export.Dim.AUTO


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


@pytest.mark.parametrize("offsets", [None, [0, 0, 33, 34, 130]], ids=["dense", "packed-with-empty-and-single"])
@pytest.mark.parametrize("gate", ["none", "step", "head", "resets"])
def test_the_traced_body_is_the_chunk_form(offsets: list[int] | None, gate: str) -> None:
    q, k, v, g = (x.double() for x in activations(2 if offsets is None else 1, 130))
    gamma = None
    if gate == "resets":
        g[:, ::7], g[:, 3::11] = -torch.inf, -1e4
    if gate == "head":
        g, gamma = None, torch.tensor([-0.1, -1e4, -2.0, 0.0], dtype=torch.float64)
    if gate == "none":
        g = None
    offsets = None if offsets is None else torch.tensor(offsets)
    state = torch.randn(2 if offsets is None else 4, 4, 10, 7, dtype=torch.float64)
    forward = (q, k, v, g, gamma, None, state, True, False, offsets, None, 16)
    for got, wanted in zip(traced.forward(*forward), torch.ops.fla.chunk_simple_gla(*forward), strict=True):
        torch.testing.assert_close(got, wanted)
    mask = [True, True, True, g is not None, gamma is not None, True]
    backward = (q, k, v, g, gamma, state, offsets, torch.randn_like(v), torch.randn_like(state), None, False, 16, mask)
    for got, wanted in zip(traced.backward(*backward), torch.ops.fla.chunk_simple_gla_backward(*backward), strict=True):
        torch.testing.assert_close(got, wanted)


def test_on_a_gpu_the_graph_holds_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index=None: (9, 0))
    with stub_driver(), FakeTensorMode(allow_non_fake_inputs=True), fla_ops.inlining():
        graph = make_fx(dispatch_functionalize(lambda *args: fla_ops.chunk_simple_gla(*args)[0]))(
            *activations(2, 100, "cuda")
        )
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count("triton_kernel_wrapper_functional") == 2
    assert not any("fla" in target for target in targets)
