"""Put a Mamba-2 model of transformers on these operators with one line: same tokens, packed training, and the time.

    python examples/mamba2_transformers.py --time 512 --tokens 32

The model is small and its weights are random, so that nothing is downloaded; the line is the same for one that was
loaded with `from_pretrained`, and for the other architectures in docs/models.md. It needs transformers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM

import fla_ops.integrations.transformers as integration


def small_model(layers: int = 4, width: int = 256, head_width: int = 64, state: int = 64) -> Mamba2ForCausalLM:
    """A Mamba-2 model with random weights, on the code that transformers brings."""
    config = Mamba2Config(
        vocab_size=256,
        hidden_size=width,
        num_hidden_layers=layers,
        expand=2,
        num_heads=2 * width // head_width,
        head_dim=head_width,
        state_size=state,
        n_groups=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.1,
    )
    return Mamba2ForCausalLM(config).eval()


def packed_gradients(model: Mamba2ForCausalLM, tokens: Tensor, lengths: list[int]) -> list[Tensor]:
    """Gradients of a loss over sequences that lie end to end in one row; transformers alone refuses them."""
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(tokens.device)
    hidden = model.backbone(tokens[:1], seq_idx=numbers.int(), use_cache=False).last_hidden_state
    return list(torch.autograd.grad(model.lm_head(hidden).logsumexp(-1).mean(), list(model.backbone.parameters())))


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
    """Run the model, switch the operators on, run it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--time", type=int, default=512, help="steps of the prompt")
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

    def generate() -> Tensor:
        return model.generate(prompt, max_new_tokens=arguments.tokens, do_sample=False)

    logits, tokens = [], []
    for name in ("transformers", "fla_ops"):
        if name == "fla_ops":
            integration.patch(model)  # the line
        logits.append(forward())
        tokens.append(generate())
        print(f"{name:12s} forward {milliseconds(forward, arguments.repeats):8.1f} ms")
        print(f"{name:12s} {arguments.tokens} tokens {milliseconds(generate, 1):8.1f} ms")
    print(f"logits differ by {float((logits[0] - logits[1]).abs().max()):.1e}")
    print(f"{float((tokens[0] == tokens[1]).float().mean()):.0%} of the tokens are the same")

    half = arguments.time // 2
    gradients = packed_gradients(model, prompt, [half, arguments.time - half])
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    print(f"two packed sequences: {len(gradients)} gradients, all finite: {finite}")


if __name__ == "__main__":
    main()
