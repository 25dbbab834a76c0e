"""Whole models of flash-linear-attention on a CPU: steps, padding, packing, tokens, gradients, one graph.

fla's kernels do not run here, so a model is compared with itself: two ways to one result. What each function computes
is compared with its definition in test_fla_parts.py and test_fla_operators.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fla_ops
from tests.integrations.fla_models import EVERY, NOT_PACKED, ONE_STEP, REFERENCES, build, left_padding, prompt
from tests.numerics import check, close

import fla_ops.integrations.fla as integration  # isort: skip    # the models skip first


@pytest.fixture(autouse=True, scope="module")
def served() -> Iterator[None]:
    integration.enable()
    yield
    integration.disable()


@pytest.fixture(params=EVERY)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def logits(model: Any, tokens: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens, use_cache=False, **inputs).logits
    return found


def in_pieces(model: Any, tokens: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of the tokens, a piece at a time."""
    found, cache, end = [], None, 0
    with torch.no_grad():
        for piece in tokens.split(sizes, 1):
            end += piece.shape[1]
            seen = None if mask is None else mask[:, :end]
            outputs = model(piece, use_cache=True, past_key_values=cache, attention_mask=seen)
            found.append(outputs.logits)
            cache = outputs.past_key_values
    return torch.cat(found, 1)


def test_a_step_sees_no_later_one(name: str) -> None:
    model, tokens = build(name), prompt()
    close(logits(model, tokens)[:, :20], logits(model, tokens[:, :20]))


def test_pieces_and_steps(name: str) -> None:
    model, tokens = build(name), prompt()
    sizes = [33] if name in ONE_STEP else [20, 13]
    close(in_pieces(model, tokens, [*sizes, 1, 1, 1, 1]), logits(model, tokens))


def test_left_padding_is_no_padding(name: str) -> None:
    model, tokens = build(name), prompt()
    mask = left_padding(tokens)
    whole, alone = logits(model, tokens, attention_mask=mask), logits(model, tokens[1:, 11:])[0]
    close(whole[1, 11:], alone)
    close(whole[0], logits(model, tokens[:1])[0])
    close(in_pieces(model, tokens, [33, 1, 1, 1, 1], mask)[1, 11:], alone)


def test_packed_sequences_are_separate(name: str) -> None:
    model, tokens = build(name), prompt(1)
    offsets = torch.tensor([0, 14, 16, 37])
    if name in NOT_PACKED:
        with pytest.raises(TypeError, match="cu_seqlens"):
            model(tokens, cu_seqlens=offsets)
        return
    separate = [logits(model, piece) for piece in tokens.split([14, 2, 21], 1)]
    close(logits(model, tokens, cu_seqlens=offsets), torch.cat(separate, 1))


def test_greedy_tokens(name: str) -> None:
    model, tokens = build(name), prompt(2, 17)
    expected = tokens
    for _ in range(5):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), expected)


def gradients(model: Any, tokens: Tensor, run: Any = None) -> dict[str, Tensor]:
    """The loss, and its gradient in every parameter that it reaches."""
    model.zero_grad()
    loss = (model if run is None else run)(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


FUSED = {"fuse_cross_entropy": True, "fuse_linear_cross_entropy": False}
CHUNKED = {"fuse_cross_entropy": False, "fuse_linear_cross_entropy": True, "use_l2warp": True}
PLAIN = {"fuse_cross_entropy": False, "fuse_norm": False, "fuse_swiglu": False, "use_l2warp": True}
FLAGS = [pytest.param(name, FUSED, id=name) for name in EVERY]
FLAGS += [pytest.param("retnet", CHUNKED, id="chunked-loss"), pytest.param("retnet", PLAIN, id="nothing-fused")]


@pytest.mark.filterwarnings("ignore:`fuse_linear_cross_entropy` is enabled")
@pytest.mark.parametrize(("one", "flags"), FLAGS)
def test_loss_and_every_gradient(one: str, flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the operators' equations in the same model."""
    model, tokens = build(one, **flags), prompt()
    double = copy.deepcopy(model).double()
    found, exact = gradients(model, tokens), gradients(double, tokens)
    for name, reference in REFERENCES.items():
        monkeypatch.setattr(fla_ops, name, reference)
    single, truth = gradients(model, tokens), gradients(double, tokens)
    check(found, single, truth, torch.float32)
    if one != "forgetting_transformer":  # its gate is float32 whatever the model's dtype
        check(exact, truth, truth, torch.float64)
    unused = {key for key, _ in model.named_parameters()} - truth.keys()
    assert not [key for key in unused if "attn_res" not in key]  # of a layer that has one source to attend to


# Compiling takes the longest: one model quickly, the others with the slow tests.
COMPILED = [one if one == "retnet" else pytest.param(one, marks=pytest.mark.slow) for one in EVERY]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_one_graph_with_padding(name: str) -> None:
    model, tokens = build(name), prompt()
    mask = left_padding(tokens)
    found = logits(torch.compile(model, fullgraph=True, backend="eager"), tokens, attention_mask=mask)
    close(found[mask.bool()], logits(model, tokens, attention_mask=mask)[mask.bool()])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "name", [one if one == "mamba2" else pytest.param(one, marks=pytest.mark.slow) for one in EVERY]
)
def test_one_graph_for_a_step(name: str) -> None:
    """The prompt and a step after it, with the cache that the model makes."""
    model, tokens = build(name), prompt()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(in_pieces(compiled, tokens[:, :34], [33, 1]), logits(model, tokens[:, :34]))


def train_compiled(name: str, backend: str, **flags: bool) -> None:
    model, tokens = build(name, **{**FUSED, **flags}), prompt()
    expected = gradients(model, tokens)
    found = gradients(model, tokens, torch.compile(model, fullgraph=True, backend=backend))
    check(found, expected, expected, torch.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_forward_and_backward(name: str) -> None:
    train_compiled(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`fuse_linear_cross_entropy` is enabled")
@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_with_logits_of_one_chunk() -> None:
    train_compiled("linear_attn", "aot_eager", **CHUNKED)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("one", ["gsa", "mamba2"])
def test_compiled_training(one: str) -> None:
    train_compiled(one, "inductor")


def test_mamba2_is_what_flas_pytorch_code_computes() -> None:
    """The one layer that fla has PyTorch code for; with several groups that code gives heads another group than fla's
    own step and the kernels of mamba_ssm do.
    """
    layer = build("mamba2", n_groups=1).backbone.layers[0].mixer
    hidden, mask = torch.randn(2, 37, 32), left_padding(prompt())
    results = []
    for forward in (layer, layer.torch_forward):
        layer.zero_grad()
        o = forward(hidden * mask[..., None], attention_mask=mask)[0] * mask[..., None]
        o.sum().backward()
        results.append({"o": o.detach(), **{key: p.grad.clone() for key, p in layer.named_parameters()}})
    check(*results, results[1], torch.float32)
