"""Whole models of transformers, with and without fla_ops: logits, gradients, padding, caches, tokens, packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fla_ops.integrations.transformers as integration
from tests.integrations.models import DELTA_RULE, EVERY, RECURRENT, SCANS, SOFTMAX, build, padding, prompt
from tests.numerics import check, close


def serve(name: str, model: Any) -> Any:
    """Switch fla_ops on, in the way that is meant for this model."""
    if name in (*RECURRENT, *integration.EAGER_ONLY):
        return integration.patch(model)
    integration.enable()
    model.set_attn_implementation("fla_ops")
    return model


def cached(outputs: Any) -> dict[str, Any]:
    """The cache of a call, as an argument of the next."""
    key = "cache_params" if "cache_params" in outputs else "past_key_values"
    return {key: outputs[key]}


def gradients(model: Any, tokens: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Of every parameter that the loss reaches."""
    model.zero_grad()
    model(tokens, use_cache=False, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_and_every_gradient(name: str, side: str) -> None:
    model, tokens = build(name), prompt()
    mask = padding(tokens, side)
    labels = tokens.masked_fill(mask == 0, -100)
    if side == "left":
        labels[1, 11] = -100  # else the last step of padding predicts the first token
    results = []
    for on in (False, True):
        if on:
            serve(name, model)
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask, use_cache=False).logits
        results.append((logits[mask.bool()], gradients(model, tokens, attention_mask=mask, labels=labels)))
    (logits, grads), (our_logits, our_grads) = results
    close(our_logits, logits)
    assert our_grads.keys() == grads.keys()
    assert len(grads) > 10
    for key, grad in grads.items():
        close(our_grads[key], grad)


def in_pieces(model: Any, tokens: Tensor) -> Tensor:
    """Logits of a prompt in two pieces and of steps after it."""
    logits, outputs = [], None
    for piece in tokens.split([20, 13, *(1,) * (tokens.shape[1] - 33)], 1):
        outputs = model(piece, use_cache=True, **({} if outputs is None else cached(outputs)))
        logits.append(outputs.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", EVERY)
def test_prompt_in_pieces_and_steps(name: str) -> None:
    model, tokens = build(name), prompt()
    with torch.no_grad():
        whole, pieces = model(tokens, use_cache=False).logits, in_pieces(model, tokens)
        serve(name, model)
        close(model(tokens, use_cache=False).logits, whole)
        close(in_pieces(model, tokens), pieces)


@pytest.mark.parametrize("name", EVERY)
def test_generated_tokens(name: str) -> None:
    model, tokens = build(name), prompt()
    calls = (
        {"inputs": tokens},
        {"inputs": tokens, "attention_mask": padding(tokens, "left")},
        {"inputs": tokens[:, :12], "num_beams": 3},
    )
    theirs = [model.generate(**call, max_new_tokens=6, do_sample=False) for call in calls]
    serve(name, model)
    for call, expected in zip(calls, theirs, strict=True):
        assert torch.equal(model.generate(**call, max_new_tokens=6, do_sample=False), expected)


def test_lightning_steps_of_large_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """They go through the operator, small ones through ATen: no state of these models is large."""
    monkeypatch.setattr(integration, "SMALL_STATE", 0)
    test_generated_tokens("minimax")


LENGTHS = (14, 1, 22)


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """Sequences laid end to end, the positions of their tokens, and which sequence each belongs to."""
    tokens = prompt(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    seq_idx = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    return tokens, positions, seq_idx.int()


def packed_loss(model: Any, tokens: Tensor, **inputs: Any) -> Tensor:
    """The base model's, which hands on what packs: Mamba2ForCausalLM keeps it to itself."""
    hidden = model.base_model(tokens, use_cache=False, **inputs).last_hidden_state
    return model.get_output_embeddings()(hidden).logsumexp(-1).sum()


@pytest.mark.parametrize("name", SCANS)
def test_packed_training_equals_sequences_apart(name: str) -> None:
    # The attention of granitemoehybrid separates packed sequences only in flash kernels.
    changes = {"layer_types": ["mamba", "mamba"]} if name == "granitemoehybrid" else {}
    model = integration.patch(build(name, **changes)).train()
    tokens, positions, seq_idx = packed()
    packed_loss(model, tokens, position_ids=positions, seq_idx=seq_idx).backward()
    result = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for part in tokens.split(LENGTHS, 1):
        packed_loss(model, part).backward()
    assert len(result) > 10
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            close(result[key], parameter.grad)


@pytest.mark.parametrize("name", DELTA_RULE)
def test_packed_delta_rule_equals_sequences_apart(name: str) -> None:
    model = integration.patch(build(name)).train()
    tokens, positions, seq_idx = packed()
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    packed_loss(model, tokens, position_ids=positions, cu_seq_lens_q=offsets).backward()
    result = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for part in tokens.split(LENGTHS, 1):
        packed_loss(model, part).backward()
    assert len(result) > 10
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            close(result[key], parameter.grad)
    with pytest.raises(ValueError, match="need cu_seq_lens_q, got seq_idx alone"):
        packed_loss(model, tokens, position_ids=positions, seq_idx=seq_idx)


@pytest.mark.parametrize("name", SOFTMAX)
def test_packed_attention(name: str) -> None:
    model = build(name)
    tokens, positions, _ = packed()
    expected = gradients(model, tokens, position_ids=positions, labels=tokens)
    result = gradients(serve(name, model), tokens, position_ids=positions, labels=tokens)
    for key, grad in expected.items():
        close(result[key], grad)


def test_transformers_alone_cannot_pack() -> None:
    tokens, positions, seq_idx = packed()
    with pytest.raises(ValueError, match="packed sequences"):
        packed_loss(build("mamba2"), tokens, position_ids=positions, seq_idx=seq_idx)


@pytest.mark.parametrize("name", ["minimax", "gpt_oss"])
def test_gradients_of_a_decode_step(name: str) -> None:
    model, tokens = build(name), prompt()
    results = []
    for on in (False, True):
        if on:
            serve(name, model)
        with torch.no_grad():
            cache = cached(model(tokens, use_cache=True))
        model.zero_grad()
        parameters = [p for key, p in model.named_parameters() if key.endswith(("norm.weight", "norm_f.weight"))]
        model(tokens[:, :1], use_cache=True, **cache).logits.logsumexp(-1).sum().backward()
        results.append([p.grad.clone() for p in parameters if p.grad is not None])
    assert results[0]
    for grad, ours in zip(*results, strict=True):
        close(ours, grad)


@pytest.mark.parametrize("name", RECURRENT)
def test_gradient_checkpointing(name: str) -> None:
    model, tokens = build(name).train(), prompt()
    expected = gradients(model, tokens, labels=tokens)
    integration.patch(model).activation_checkpointing_enable()
    result = gradients(model, tokens, labels=tokens)
    for key, grad in expected.items():
        close(result[key], grad)


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1", "minimax", "qwen3_next", "gpt_oss"])
def test_bfloat16_is_as_far_from_the_truth(name: str) -> None:
    model, tokens = build(name), prompt()
    with torch.no_grad():
        truth = model(tokens, use_cache=False).logits
        model = model.to(torch.bfloat16)
        theirs = model(tokens, use_cache=False).logits
        ours = serve(name, model)(tokens, use_cache=False).logits
    assert ours.dtype == theirs.dtype
    check({"logits": ours}, {"logits": theirs}, {"logits": truth}, torch.bfloat16)
