"""Replace the lightning attention of a MiniMax model by fla_ops, and compare: same tokens, and the time of both.

    python examples/minimax_lightning.py --time 1024 --tokens 32

The model is small and its weights are random, so that nothing is downloaded; `replace_lightning_attention(model)` does
the same to one that was loaded with `from_pretrained`. The replacement reads and writes the model's own cache, as
`generate` does. It needs transformers.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

import fla_ops


class LightningAttention(nn.Module):
    """The layer with the weights of the one it replaces; the loops over blocks and steps are one operator each."""

    def __init__(self, layer: MiniMaxLightningAttention) -> None:
        super().__init__()
        self.layer_idx, self.num_layers = layer.layer_idx, layer.num_hidden_layers
        self.num_heads = layer.num_attention_heads
        decay = fla_ops.lightning_decay(self.num_heads, self.layer_idx, self.num_layers, "alibi")
        self.register_buffer("decay", decay.to(layer.out_proj.weight.device), persistent=False)
        self.act_fn, self.norm = layer.act_fn, layer.norm
        self.qkv_proj, self.out_proj, self.output_gate = layer.qkv_proj, layer.out_proj, layer.output_gate

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,  # noqa: ARG002 - given to every layer, used by softmax attention
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, width] to the same; the cache holds the state [B, H, K, V] of each sequence."""
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:  # [B, T]: padding writes nothing into the state
            qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
        q, k, v = qkv.unflatten(-1, (self.num_heads, -1)).chunk(3, -1)
        state = None if past_key_values is None else past_key_values.get_linear_cache(self.layer_idx)
        if state is not None and q.shape[1] == 1:
            o = fla_ops.simple_gla_step_(q[:, 0], k[:, 0], v[:, 0], state, g_gamma=self.decay, scale=1.0)[:, None]
        else:
            layer, keep = (self.layer_idx, self.num_layers), past_key_values is not None
            o, state = fla_ops.lightning_attn(q, k, v, *layer, 1.0, state, keep, slopes="alibi")
        if past_key_values is not None:
            past_key_values.set_linear_cache(self.layer_idx, state)
        return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * self.norm(o.flatten(2))), state


def replace_lightning_attention(model: nn.Module) -> nn.Module:
    """Put LightningAttention, with the same weights, wherever the model has MiniMax's own; returns the model."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, MiniMaxLightningAttention):
                setattr(parent, name, LightningAttention(child))
    return model


def small_model(layers: int = 4, width: int = 256, heads: int = 4, block_size: int = 256) -> MiniMaxForCausalLM:
    """A MiniMax model with random weights: softmax attention in the first layer, lightning attention in the others."""
    config = MiniMaxConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=block_size,
        layer_types=["full_attention"] + ["linear_attention"] * (layers - 1),
        eos_token_id=None,
        initializer_range=0.1,
    )
    return MiniMaxForCausalLM(config).eval()


def lightning_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that are compared."""
    return [m for m in model.modules() if isinstance(m, (MiniMaxLightningAttention, LightningAttention))]


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """The fastest of some runs, after two that warm up: the second may still compile for sizes that vary."""
    torch._dynamo.reset()  # what an earlier measurement compiled counts towards the limit of recompilations
    best = float("inf")
    for i in range(repeats + 2):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i > 1:
            best = min(best, time.perf_counter() - start)
    return 1000 * best


def times(model: MiniMaxForCausalLM, prompt: Tensor, hidden: Tensor, tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds of one lightning layer over the prompt, forward and backward, and of a generated token."""
    layer = lightning_layers(model)[-1]

    def forward() -> None:
        with torch.no_grad():
            layer(hidden, position_embeddings=None, attention_mask=None)

    def train() -> None:
        x = hidden.clone().requires_grad_()
        layer(x, position_embeddings=None, attention_mask=None)[0].sum().backward()

    def generate() -> None:
        model.generate(prompt[:, :16], max_new_tokens=tokens, do_sample=False)

    return {
        "one layer, forward": milliseconds(forward, repeats),
        "one layer, forward and backward": milliseconds(train, repeats),
        "all layers, one generated token": milliseconds(generate, min(repeats, 3)) / tokens,
    }


def main() -> None:
    """Build both models, compare their tokens, print their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--time", type=int, default=1024, help="steps of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="do not time the compiled layers as well")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = small_model().to(device)
    ours = replace_lightning_attention(copy.deepcopy(theirs))
    prompt = torch.randint(0, 256, (arguments.batch, arguments.time), device=device)
    hidden = torch.randn(arguments.batch, arguments.time, theirs.config.hidden_size, device=device)

    generated = [m.generate(prompt, max_new_tokens=arguments.tokens, do_sample=False) for m in (theirs, ours)]
    same = torch.equal(*generated)
    print(f"{arguments.tokens} tokens after {arguments.time}: {'the same' if same else 'DIFFERENT'} from both models")

    sizes = (prompt, hidden, arguments.tokens, arguments.repeats)
    show("eager", times(theirs, *sizes), times(ours, *sizes))
    if not arguments.eager:
        for model in (theirs, ours):
            for layer in lightning_layers(model):
                layer.compile()
        show("compiled", times(theirs, *sizes), times(ours, *sizes))


def show(how: str, theirs: dict[str, float], ours: dict[str, float]) -> None:
    """Print the times of both models."""
    print(f"\nmilliseconds, {how:38s}transformers   fla_ops")
    for what, milliseconds in theirs.items():
        print(f"  {what:48s}{milliseconds:12.2f}{ours[what]:10.2f}")


if __name__ == "__main__":
    main()
