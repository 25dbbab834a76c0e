"""Switching fla on and off: what is replaced, where, and what is refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.integrations.fla_models import build, prompt

import fla_ops.integrations.fla as integration  # isort: skip    # the models skip first
from fla_ops.integrations.fla import activations, convolution, norms, replacing, rotary  # isort: skip


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    yield
    integration.disable()


def held() -> dict[str, Any]:
    """What fla's modules hold: every name that is no module's own, and the methods that are replaced."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] == "fla":
            found |= {f"{name}.{key}": value for key, value in vars(module).items() if callable(value)}
    table = importlib.import_module("fla.modules.activations").ACT2FN
    found |= {f"ACT2FN[{key}]": value for key, value in table.items()}
    for module, name, *_ in replacing.REPLACEMENTS:
        owner, _, method = name.rpartition(".")
        if owner:
            found[f"{module}.{name}"] = vars(getattr(importlib.import_module(module), owner))[method]
    return found


def test_enable_replaces_everywhere_and_disable_restores() -> None:
    before = held()
    counts = integration.enable()
    during = held()
    changed = {key for key in before if during[key] is not before[key]}
    assert {f"{module}.{name}" for module, name, *_ in replacing.REPLACEMENTS} == counts.keys()
    assert min(counts.values()) > 0
    assert {"fla.modules.norm.layernorm.rms_norm", "fla.layers.gsa.chunk_gsa", "ACT2FN[swish]"} <= changed
    assert during["fla.layers.gsa.rms_norm_linear"] is norms.rms_norm_linear
    assert integration.enable() == {}  # again changes nothing
    assert held() == during
    integration.disable()
    assert held() == before
    integration.disable()


def test_models_built_before_and_after() -> None:
    """A layer keeps its activation and its convolution; they are replaced there too."""
    early = build("mamba2")
    mixer = early.backbone.layers[0].mixer
    before = mixer.act, mixer.causal_conv1d_fn
    integration.enable()
    late = build("mamba2")
    for layer in (mixer, late.backbone.layers[0].mixer):
        assert layer.act is activations.swish
        assert layer.causal_conv1d_fn is convolution.causal_conv1d
    with torch.no_grad():
        assert torch.equal(early(prompt()).logits, late(prompt()).logits)
    integration.disable()
    for layer in (mixer, late.backbone.layers[0].mixer):
        assert (layer.act, layer.causal_conv1d_fn) == before


def test_modules_imported_later_are_served_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    integration.enable()
    later = ModuleType("fla.layers.later")
    monkeypatch.setitem(sys.modules, later.__name__, later)
    exec("from fla.modules.layernorm import rms_norm", vars(later))
    assert later.rms_norm is norms.rms_norm
    integration.disable()
    original = importlib.import_module("fla.modules.norm.layernorm").rms_norm
    assert later.rms_norm is original is not norms.rms_norm


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import fla", "import fla_ops"])
def test_both_packages_in_any_order(first: str) -> None:
    """The integration imports fla when it is switched on, and not before."""
    code = f"""
import sys, warnings
warnings.simplefilter("ignore")
{first}
import fla_ops.integrations.fla as integration
assert ("fla" in sys.modules) == ({first!r} == "import fla")
assert "fla.modules.norm.l2norm.l2norm" in integration.enable()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def with_parameters(parameters: str) -> Any:
    """A function that takes these and does nothing."""
    return eval(f"lambda {parameters}: None")


CHANGED = [
    pytest.param("fla.modules.norm.l2norm", "l2norm", "x, eps", "x, eps=1e-06, output_dtype=None", id="function"),
    pytest.param("fla.ops.gsa.chunk", "chunk_gsa", "q, k, v", "q, k, v, s, g=None, ", id="operator"),
    pytest.param(
        "fla.layers.forgetting_attn", "ForgettingAttention.forward", "self, x", "self, hidden_states, ", id="adapted"
    ),
]


@pytest.mark.parametrize(("module", "name", "parameters", "ours"), CHANGED)
def test_a_release_that_calls_a_function_otherwise(
    module: str, name: str, parameters: str, ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = importlib.import_module(module)
    *classes, attribute = name.split(".")
    for cls in classes:
        owner = getattr(owner, cls)
    monkeypatch.setattr(owner, attribute, with_parameters(parameters))
    before = held()
    message = rf"^fla \S+ calls {module}\.{name} with \({parameters}\); fla_ops serves it with \({ours}.*Nothing was"
    with pytest.raises(RuntimeError, match=message):
        integration.enable()
    assert held() == before


def test_a_release_without_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fla.modules.rotary.ops")
    monkeypatch.delattr(module.RotaryEmbedding, "forward")
    before = {key: value for key, value in vars(module).items() if callable(value)}
    message = r"^fla_ops serves fla\.modules\.rotary\.ops\.RotaryEmbedding\.forward, and fla \S+ has no such function"
    with pytest.raises(RuntimeError, match=message):
        integration.enable()
    assert {key: value for key, value in vars(module).items() if callable(value)} == before


def test_flash_attn_stays_on_a_gpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = importlib.import_module("fla.layers.attn")
    theirs = with_parameters("q, k, v, **kwargs")
    monkeypatch.setattr(layers, "flash_attn_func", theirs)
    integration.enable()
    q = torch.randn(1, 5, 2, 8)
    assert layers.flash_attn_func(q, q, q, causal=True).shape == q.shape

    class OnGPU:
        is_cuda = True

    assert layers.flash_attn_func(OnGPU(), None, None, causal=True) is None
    integration.disable()
    assert layers.flash_attn_func is theirs
    assert not hasattr(layers, "flash_attn_varlen_func")


@pytest.mark.parametrize("settings", [{}, {"interleaved": True}, {"scale_base": 16.0}, {"pos_idx_in_fp32": False}])
def test_rotary_layer_takes_the_positions_that_flas_table_has(settings: dict[str, Any]) -> None:
    layer = importlib.import_module("fla.modules.rotary").RotaryEmbedding(8, **settings)
    integration.enable()
    q, k = torch.randn(2, 2, 5, 2, 8)
    layer._update_cos_sin_cache(20, torch.device("cpu"), torch.float32)
    tables = [(layer._cos_cached, layer._sin_cached)] * 2
    if layer.scale is not None:
        tables[1] = (layer._cos_k_cached, layer._sin_k_cached)
    for offset in (0, 6, torch.tensor([1, 9])):
        for x, turned, table in zip((q, k), layer(q, k, offset, max_seqlen=20), tables, strict=True):
            expected = rotary.rotary_embedding(x, *table, layer.interleaved, seqlen_offsets=offset)
            torch.testing.assert_close(turned, expected)


def test_losses_by_their_classes() -> None:
    modules = importlib.import_module("fla.modules")
    logits, target = torch.randn(6, 9, dtype=torch.float64), torch.tensor([1, -100, 3, 8, 0, 2])
    integration.enable()
    for reduction in ("mean", "sum", "none"):
        expected = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1, reduction=reduction)
        criterion = modules.FusedCrossEntropyLoss(reduction=reduction, label_smoothing=0.1, inplace_backward=True)
        torch.testing.assert_close(criterion(logits, target), expected)
    loss, penalty = modules.FusedCrossEntropyLoss(lse_square_scale=0.5, return_z_loss=True)(logits, target)
    kept = target >= 0
    torch.testing.assert_close(penalty, 0.5 * logits[kept].logsumexp(-1).square().mean())
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target) + penalty)
