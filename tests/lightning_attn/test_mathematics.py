"""The mathematics of lightning_attn: two rules for the decay, how they trace, resuming, decoding, the pinned graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import fla_ops
from tests import numerics
from tests.cases import EXPORT, cases
from tests.contract.helpers import export, listing

FORMS = ("chunk_lightning_attn", "fused_chunk_lightning_attn", "fused_recurrent_lightning_attn", "lightning_attn")
SLOPES = ("linear", "alibi")
B, T, HK, H, K, V = 2, 37, 3, 6, 10, 7
LAYER = {"layer_idx": 1, "num_layers": 4}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
BOTH_RULES = pytest.mark.parametrize("slopes", SLOPES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal, in float64: what is left over is the difference between two formulas."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs() -> dict[str, Tensor]:
    """q, k, v and a state."""
    return {
        "q": draw(B, T, HK, K, seed=1),
        "k": draw(B, T, HK, K, seed=2) * K**-0.5,
        "v": draw(B, T, H, V, seed=3),
        "initial_state": draw(B, H, K, V, seed=4),
    }


def run(form: str, arguments: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The output and the final state; chunks of 16 steps where the form has them."""
    if form != "fused_recurrent_lightning_attn":
        options["chunk_size"] = 16
    return list(getattr(fla_ops, form)(**arguments, **LAYER, output_final_state=True, **options))


def differentiate(outputs: list[Tensor], leaves: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, then the gradient of every input, of a sum with fixed weights."""
    weights = [draw(*y.shape, seed=9) for y in outputs]
    return outputs + list(torch.autograd.grad(outputs, list(leaves.values()), weights))


def leaves_of(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values, each wanting a gradient."""
    return {n: x.detach().requires_grad_() for n, x in arguments.items()}


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    """The same, but for rounding."""
    for x, y in zip(found, expected, strict=True):
        numerics.close(x, y)


@pytest.mark.parametrize(("layer_idx", "num_layers"), [(0, 1), (0, 6), (3, 6), (5, 6)])
def test_the_linear_rule(layer_idx: int, num_layers: int) -> None:
    """Head 0 never forgets; the last head of the first layer forgets fastest."""
    decay = fla_ops.lightning_decay(H, layer_idx, num_layers, dtype=torch.float64)
    expected = [-(8 / H) * (1 - layer_idx / num_layers) * h for h in range(H)]
    torch.testing.assert_close(decay, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("layer_idx", "num_layers"), [(0, 1), (0, 6), (3, 6), (5, 6)])
def test_the_alibi_rule(layer_idx: int, num_layers: int) -> None:
    """Head 0 forgets fastest; every head of the last layer hardly forgets."""
    decay = fla_ops.lightning_decay(H, layer_idx, num_layers, "alibi", dtype=torch.float64)
    depth = 1 - layer_idx / (num_layers - 1 + 1e-5) + 1e-5
    expected = [-(2 ** (-8 * (h + 1) / H)) * depth for h in range(H)]
    torch.testing.assert_close(decay, torch.tensor(expected, dtype=torch.float64))


@BOTH_RULES
def test_decay_is_float32_on_the_device_that_is_asked_for(slopes: str) -> None:
    decay = fla_ops.lightning_decay(H, 1, 4, slopes, device="meta")
    assert (decay.dtype, decay.device.type, decay.shape) == (torch.float32, "meta", (H,))
    assert fla_ops.lightning_decay(H, 1, 4, slopes, dtype=torch.float64, device="cpu").dtype is torch.float64


@BOTH_RULES
def test_decay_is_made_without_a_copy(slopes: str) -> None:
    """What a trace holds: a range and arithmetic with numbers, no tensor from the host."""
    graph = make_fx(lambda: fla_ops.lightning_decay(H, 1, 4, slopes))()
    assert not dict(graph.named_buffers())
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert names[0].startswith("aten.arange")
    assert not [name for name in names if "copy" in name or "lift" in name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((4, 6, 6), r"layer_idx must be in \[0, num_layers\) = \[0, 6\), got 6", id="past-the-last"),
        pytest.param((4, -1, 6), r"layer_idx must be in \[0, num_layers\) = \[0, 6\), got -1", id="before-the-first"),
        pytest.param((4, 0, 0), r"num_layers must be at least 1, got 0", id="no-layers"),
        pytest.param((0, 0, 1), r"num_heads must be at least 1, got 0", id="no-heads"),
        pytest.param((4, 0, 1, "steep"), r"slopes must be one of linear, alibi, got 'steep'", id="unknown-rule"),
    ],
)
def test_decay_of_what_does_not_exist_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fla_ops.lightning_decay(*arguments)


@EVERY_FORM
@BOTH_RULES
def test_it_is_simple_gla_with_that_decay(form: str, slopes: str) -> None:
    decay = fla_ops.lightning_decay(H, **LAYER, slopes=slopes, dtype=torch.float64)
    found, expected = leaves_of(inputs()), leaves_of(inputs())
    outputs = fla_ops.chunk_simple_gla(**expected, g_gamma=decay, output_final_state=True)
    assert_equal(differentiate(run(form, found, slopes=slopes), found), differentiate(list(outputs), expected))


@EVERY_FORM
@BOTH_RULES
@pytest.mark.parametrize("split", [0, 1, 16, 20, T], ids=lambda n: f"after-{n}-steps")
def test_resuming_equals_not_having_stopped(form: str, split: int, slopes: str) -> None:
    """Gradients too: they flow back through the state from the second part into the first."""
    leaves = leaves_of(inputs())
    whole = differentiate(run(form, leaves, slopes=slopes), leaves)
    leaves = leaves_of(inputs())
    o1, state = run(form, {n: x if n == "initial_state" else x[:, :split] for n, x in leaves.items()}, slopes=slopes)
    second = {n: state if n == "initial_state" else x[:, split:] for n, x in leaves.items()}
    o2, final = run(form, second, slopes=slopes)
    assert_equal(differentiate([torch.cat([o1, o2], 1), final], leaves), whole)


@BOTH_RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_equals_the_recurrence(dtype: torch.dtype, slopes: str) -> None:
    """A prompt in one piece, then step after step in place, with the decay that was made once."""
    q, k, v, state = (x.to(dtype) for x in inputs().values())
    options = {**LAYER, "slopes": slopes, "output_final_state": True}
    whole, final = fla_ops.fused_recurrent_lightning_attn(q, k, v, initial_state=state, **options)
    o, pool = fla_ops.lightning_attn(q[:, :12], k[:, :12], v[:, :12], initial_state=state, **options)
    decay = fla_ops.lightning_decay(H, **LAYER, slopes=slopes)
    steps = [fla_ops.simple_gla_step_(q[:, t], k[:, t], v[:, t], pool, g_gamma=decay) for t in range(12, T)]
    numerics.close(torch.cat([o, torch.stack(steps, 1)], 1), whole)
    numerics.close(pool, final, dtype)


@pytest.mark.parametrize("mode", ["chunk", "fused_chunk", "fused_recurrent"])
def test_dispatcher_runs_the_named_form(mode: str) -> None:
    arguments = inputs()
    found = fla_ops.lightning_attn(**arguments, **LAYER, chunk_size=16, mode=mode)
    assert torch.equal(found[0], run(f"{mode}_lightning_attn", arguments)[0])
    assert found[1] is None


def test_explain_names_the_form_and_the_refusals() -> None:
    choice = fla_ops.explain(fla_ops.lightning_attn, **inputs(), **LAYER, reverse=True)
    assert choice.form.signature.name == "fused_recurrent_lightning_attn"
    assert set(choice.refused) == {"chunk", "fused_chunk"}


@pytest.mark.usefixtures("fresh_compiler")
@BOTH_RULES
def test_layers_that_share_code_share_its_compilation(slopes: str) -> None:
    """The layer is a number in the graph, not a part of its key: a deep model stays under the recompilation limit."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def layer(q: Tensor, k: Tensor, v: Tensor, layer_idx: int) -> Tensor:
        return fla_ops.chunk_lightning_attn(q, k, v, layer_idx, 24, slopes=slopes)[0]

    q, k, v, _ = (x.float() for x in inputs().values())
    for layer_idx in range(2, 24):
        expected, _ = fla_ops.chunk_lightning_attn(q, k, v, layer_idx, 24, slopes=slopes)
        numerics.close(layer(q, k, v, layer_idx), expected)
    assert counter.frame_count <= 2


def test_a_trace_shows_what_was_chosen() -> None:
    (case,) = cases("lightning_attn", EXPORT)
    assert_expected_inline(
        listing(export(case).run_decompositions()),
        """\
x_q
x_k
x_v
x_initial_state
arange = aten.arange.start_step(0, 6)
mul_1 = aten.mul.Tensor(arange, -0.7999999999999999)
chunk_simple_gla = fla.chunk_simple_gla(x_q, x_k, x_v, None, mul_1, 0.3, x_initial_state, True, False, None, None, 16)
getitem = getitem(chunk_simple_gla, 0)
getitem_1 = getitem(chunk_simple_gla, 1)
output = output((getitem, getitem_1))""",
    )
