"""Switching on and off: what is replaced, when, and what is refused."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers.models.bamba import modeling_bamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.zamba2 import modeling_zamba2

import fla_ops.integrations.transformers as integration
from tests.integrations.models import DELTA_RULE, SCANS, build


def held(module: Any) -> dict[str, Any]:
    """What a modelling module holds by the names that are replaced."""
    return {name: vars(module)[name] for name in integration.FUNCTIONS}


def test_imports_on_demand() -> None:
    """The package imports neither the integrations nor transformers; the integration waits for transformers too."""
    code = """
import sys
import fla_ops
assert not [name for name in sys.modules if name.startswith(("transformers", "fla_ops.integrations"))]
import fla_ops.integrations.transformers
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", SCANS)
def test_every_scan_has_the_functions_that_are_replaced(name: str) -> None:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    before = held(module)
    integration.enable()
    assert held(module) == integration.FUNCTIONS
    integration.disable()
    assert held(module) == before


@pytest.mark.parametrize("installed", [False, True], ids=["alone", "beside-flash-linear-attention"])
@pytest.mark.parametrize("name", DELTA_RULE)
def test_the_gated_delta_rule_is_served(name: str, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where transformers would call kernels that have no device here."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    rules = [function for function in integration.DELTA_RULE if function.endswith("_rule")]
    for function in rules if installed else ():
        monkeypatch.setattr(module, function, as_if_found(getattr(module, function).__wrapped__))
    before = [vars(module)[function] for function in integration.DELTA_RULE]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    integration.enable()
    assert [vars(module)[function] for function in integration.DELTA_RULE] == [*integration.DELTA_RULE.values()]
    integration.disable()
    assert [vars(module)[function] for function in integration.DELTA_RULE] == before
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    integration.enable()
    kept = [vars(module)[function] is old for function, old in zip(integration.DELTA_RULE, before, strict=True)]
    assert kept == [installed, installed, False, False]
    integration.disable()


def test_enable_serves_every_loaded_module_and_disable_restores() -> None:
    before = held(modeling_mamba2), held(modeling_bamba), MiniMaxLightningAttention.forward
    integration.enable()
    integration.enable()  # again changes nothing
    assert held(modeling_mamba2) == held(modeling_bamba) == integration.FUNCTIONS
    assert MiniMaxLightningAttention.forward is integration.FORWARDS["MiniMaxLightningAttention"]
    integration.disable()
    assert (held(modeling_mamba2), held(modeling_bamba), MiniMaxLightningAttention.forward) == before
    integration.disable()


def test_modules_imported_later_are_served() -> None:
    code = """
import sys
import fla_ops.integrations.transformers as integration

integration.enable()
name = "transformers.models.bamba.modeling_bamba"
assert name not in sys.modules
from transformers import BambaForCausalLM
module = sys.modules[name]
assert module.mamba2_chunk_scan is integration.FUNCTIONS["mamba2_chunk_scan"]
integration.disable()
assert module.mamba2_chunk_scan is not integration.FUNCTIONS["mamba2_chunk_scan"]
from transformers import Zamba2ForCausalLM
module = sys.modules["transformers.models.zamba2.modeling_zamba2"]
assert module.mamba2_chunk_scan is not integration.FUNCTIONS["mamba2_chunk_scan"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_patch_serves_one_architecture() -> None:
    before = held(modeling_zamba2)
    model = build("mamba2")
    assert integration.patch(model) is model
    assert integration.patch(model) is model
    assert held(modeling_mamba2) == integration.FUNCTIONS
    assert held(modeling_zamba2) == before


def test_patch_sets_attention_that_has_no_other_choice_and_disable_resets_it() -> None:
    model, llama = build("gpt_oss"), build("llama")
    integration.patch(model)
    integration.patch(model)  # again changes nothing
    assert model.config._attn_implementation == "fla_ops"
    with pytest.raises(ValueError, match="got LlamaForCausalLM"):
        integration.patch(llama)
    assert llama.config._attn_implementation == "eager"
    integration.disable()
    assert model.config._attn_implementation == "eager"
    assert "fla_ops" not in integration._interfaces()[0]._global_mapping


def test_patch_refuses_a_model_that_is_none_of_transformers() -> None:
    with pytest.raises(ValueError, match=r"patch wants a model with Mamba-2 layers.* got Linear"):
        integration.patch(torch.nn.Linear(2, 2))


def as_if_found(function: Any) -> Any:
    """The function as transformers' decorator makes it where the package is installed."""
    is_new_implementation = True

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        assert is_new_implementation
        return function(*args, **kwargs)

    return wrapped


def test_kernels_of_a_package_stay_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in held(modeling_mamba2).items():
        monkeypatch.setattr(modeling_mamba2, name, as_if_found(function.__wrapped__))
    before = held(modeling_mamba2)
    integration.enable()
    assert held(modeling_mamba2) == before
    with pytest.raises(ValueError, match="force=True also replaces kernels of mamba_ssm"):
        integration.patch(build("mamba2"))
    integration.patch(build("mamba2"), force=True)
    assert held(modeling_mamba2) == integration.FUNCTIONS
    integration.disable()
    assert held(modeling_mamba2) == before


def with_parameters(parameters: str) -> Any:
    """A function that takes these and does nothing."""
    return eval(f"lambda {parameters}: None")


CHANGED = [
    pytest.param("state, x", id="other-names"),
    pytest.param("hidden_states, conv_state, weight, bias=None, activation='silu'", id="another-default"),
]


@pytest.mark.parametrize("parameters", CHANGED)
def test_a_release_that_calls_a_function_otherwise(parameters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_zamba2, "causal_conv1d_update", with_parameters(parameters))
    before = held(modeling_mamba2), held(modeling_zamba2)
    name = "transformers.models.zamba2.modeling_zamba2.causal_conv1d_update"
    message = rf"^transformers \S+ calls {name} with \({parameters}\); fla_ops serves it with \(hidden_states, "
    for switch in (integration.enable, functools.partial(integration.patch, build("zamba2"))):
        with pytest.raises(RuntimeError, match=message):
            switch()
        assert (held(modeling_mamba2), held(modeling_zamba2)) == before


def test_a_release_that_changed_the_lightning_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = with_parameters("self, hidden_states, cache")
    monkeypatch.setattr(MiniMaxLightningAttention, "forward", forward)
    with pytest.raises(RuntimeError, match=r"MiniMaxLightningAttention\.forward with \(self, hidden_states, cache\)"):
        integration.patch(build("minimax"))
    assert MiniMaxLightningAttention.forward is forward
