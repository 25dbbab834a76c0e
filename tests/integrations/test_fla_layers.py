"""Layers of flash-linear-attention that none of the tested models has, or in modes that none of them uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.fla_models import left_padding, prompt
from tests.numerics import check, close

import fla_ops.integrations.fla as integration  # isort: skip    # the models skip first

layers = pytest.importorskip("fla.layers")
simple_gla_layers = pytest.importorskip("fla.layers.simple_gla")  # which fla.layers does not show
cache_utils = pytest.importorskip("fla.models.cache_utils")
WIDTH = 32


@pytest.fixture(autouse=True, scope="module")
def served() -> Iterator[None]:
    integration.enable()
    yield
    integration.disable()


def make(cls: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return cls(hidden_size=WIDTH, num_heads=2, layer_idx=0, **settings)


def simple_gla(**settings: Any) -> Any:
    return make(simple_gla_layers.SimpleGatedLinearAttention, use_short_conv=True, num_kv_heads=1, **settings)


def hidden(batch: int = 2) -> Tensor:
    return torch.randn(batch, 37, WIDTH, generator=torch.Generator().manual_seed(7))


GATES = [pytest.param({}, id="fused"), pytest.param({"fuse_norm": False}, id="not-fused")]


@pytest.mark.parametrize("settings", GATES)
def test_simple_gla_with_padding_and_steps(settings: dict[str, Any]) -> None:
    layer, x = simple_gla(**settings), hidden()
    mask = left_padding(prompt())
    with torch.no_grad():
        alone = layer(x[1:, 11:])[0][0]
        close(layer(x, attention_mask=mask)[0][1, 11:], alone)
        cache, found, end = cache_utils.Cache(), [], 0
        for piece in x.split([33, 1, 1, 2], 1):
            end += piece.shape[1]
            found.append(layer(piece, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)[0])
        close(torch.cat(found, 1)[1, 11:], alone)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_simple_gla_in_one_graph() -> None:
    """Forward and backward, of padded and of packed sequences; fla multiplies by the mask in place."""
    layer, offsets = simple_gla(), torch.tensor([0, 14, 37])
    separate = torch.cat([layer(piece)[0] for piece in hidden(1).split([14, 23], 1)], 1)
    close(layer(hidden(1), cu_seqlens=offsets)[0], separate)
    inputs = {"attention_mask": left_padding(prompt())}
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        x = hidden().requires_grad_()
        o = run(x, **inputs)[0]
        o.square().sum().backward()
        results.append({"o": o.detach(), "dx": x.grad, **{key: p.grad.clone() for key, p in layer.named_parameters()}})
    check(results[1], results[0], results[0], torch.float32)


MODES = [
    (layers.MultiScaleRetention, "chunk", ("fused_chunk", "parallel", "fused_recurrent")),
    (layers.LinearAttention, "chunk", ("fused_chunk", "fused_recurrent")),
]


@pytest.mark.parametrize(("cls", "first", "others"), MODES)
def test_modes_agree(cls: Any, first: str, others: tuple[str, ...]) -> None:
    """fla takes a mode by its name for more than 64 steps without a gradient."""
    x = torch.randn(1, 70, WIDTH)
    with torch.no_grad():
        expected = make(cls, mode=first)(x)[0]
        for mode in others:
            close(make(cls, mode=mode)(x)[0], expected)


@pytest.mark.parametrize("feature_map", ["elu", "relu", "hedgehog", "t2r", "dpfp"])
def test_linear_attention_of_packed_sequences(feature_map: str) -> None:
    layer, x = (
        make(layers.LinearAttention, feature_map=feature_map, do_feature_map_norm=feature_map == "elu"),
        hidden(1),
    )
    with torch.no_grad():
        separate = torch.cat([layer(piece)[0] for piece in x.split([14, 23], 1)], 1)
        close(layer(x, cu_seqlens=torch.tensor([0, 14, 37]))[0], separate)
