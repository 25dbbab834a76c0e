"""Give a transformers model the attention of fla_ops, and compare: same tokens, and the time of both.

    python examples/gpt_oss_attention.py --time 1024 --tokens 32

What a user writes is three lines:

    AttentionInterface.register("fla_ops", attention)
    AttentionMaskInterface.register("fla_ops", no_mask)
    model.set_attn_implementation("fla_ops")

gpt-oss has all that `fla_ops.parallel_attn` takes apart from decay: query heads in groups, sinks, and a window in
every other layer. The model here is small and its weights are random, so that nothing is downloaded. It needs
transformers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GptOssConfig, GptOssForCausalLM
from transformers.masking_utils import AttentionMaskInterface

import fla_ops


def attention(
    module: nn.Module,  # noqa: ARG001 - every attention function of transformers gets it
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B, HQ, Q, K], key and value [B, H, T, K] to [B, Q, HQ, K]: all steps, or the newest against a cache."""
    if attention_mask is not None or dropout:
        raise NotImplementedError("only causal masks and windows are supported, no dropout: pack padded sequences")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    batch, steps = q.shape[:2]
    if steps == k.shape[1]:
        return fla_ops.parallel_attn(q, k, v, scale=scaling, window_size=sliding_window, sink_bias=s_aux), None
    if steps > 1:
        raise NotImplementedError("a prompt in pieces is not supported: all steps need queries, or the newest alone")
    offsets = k.shape[1] * torch.arange(batch + 1, device=q.device)
    caches = (x.flatten(0, 1).unsqueeze(0) for x in (k, v))
    o = fla_ops.attn_decoding_one_step(
        q.transpose(0, 1), *caches, scale=scaling, cu_seqlens=offsets, sink_bias=s_aux, window_size=sliding_window
    )
    return o.transpose(0, 1), None


def no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """The operators mask by themselves, so none is built; padding is refused."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise NotImplementedError("padded batches are not supported: pack the sequences, or give them one length")


def use_fla_ops(model: nn.Module) -> nn.Module:
    """The three lines; returns the model."""
    AttentionInterface.register("fla_ops", attention)
    AttentionMaskInterface.register("fla_ops", no_mask)
    model.set_attn_implementation("fla_ops")
    return model


def small_model(layers: int = 4, width: int = 256, heads: int = 8, window: int = 128) -> GptOssForCausalLM:
    """A gpt-oss model with random weights, on the attention that transformers brings."""
    config = GptOssConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=width // heads,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
        eos_token_id=None,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    model = GptOssForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(parameter)
    return model


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """The fastest of some runs, after one that warms up."""
    best = float("inf")
    for i in range(repeats + 1):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i > 0:
            best = min(best, time.perf_counter() - start)
    return 1000 * best


def main() -> None:
    """Build the model, run it on both attentions, compare tokens and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--time", type=int, default=1024, help="steps of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = small_model().to(device)
    prompt = torch.randint(1, 256, (arguments.batch, arguments.time), device=device)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(prompt, use_cache=False).logits

    def train() -> None:
        model(prompt, use_cache=False).logits.logsumexp(-1).sum().backward()
        model.zero_grad()

    def generate() -> Tensor:
        return model.generate(prompt, max_new_tokens=arguments.tokens, do_sample=False)

    logits, tokens = [], []
    for name in ("eager", "fla_ops"):
        if name == "fla_ops":
            use_fla_ops(model)
        logits.append(forward())
        tokens.append(generate())
        print(f"{name:8s} forward {milliseconds(forward, arguments.repeats):8.1f} ms")
        print(f"{name:8s} forward and backward {milliseconds(train, arguments.repeats):8.1f} ms")
        print(f"{name:8s} {arguments.tokens} tokens {milliseconds(generate, 1):8.1f} ms")
    print(f"logits differ by {float((logits[0] - logits[1]).abs().max()):.1e}")
    print(f"{float((tokens[0] == tokens[1]).float().mean()):.0%} of the tokens are the same")


if __name__ == "__main__":
    main()
