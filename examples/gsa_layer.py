"""Gated slot attention as a layer: trained under torch.compile, then a prefill whose states a decode loop goes on from.

    python examples/gsa_layer.py --steps 60

The layer is that of arXiv 2409.07146: swish feature maps, decays g = logsigmoid(.) / normaliser for each slot, and
s = 1 - exp(g), so that a slot takes in as much as it lets go. Its memory is two states of a fixed size per head,
however long the text. The text is the source of Python's standard library, byte by byte.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from language_model import BYTES, GatedMLP
from text import python_library, random_windows
from torch import Tensor, nn

import fla_ops

States = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LayerConfig:
    """What fixes the shapes."""

    width: int = 128
    query_heads: int = 4
    heads: int = 2  # of keys, values and slots: each serves query_heads // heads query heads
    head_width: int = 32
    slots: int = 32
    normaliser: float = 8.0  # decay = sigmoid(.) ** (1 / normaliser): larger remembers longer


class GatedSlotAttention(nn.Module):
    """Mixes time: [B, T, width] to [B, T, width], with states [B, H, K, M] and [B, H, M, V]."""

    def __init__(self, c: LayerConfig) -> None:
        super().__init__()
        self.config = c
        self.query = nn.Linear(c.width, c.query_heads * c.head_width, bias=False)
        self.key_value = nn.Linear(c.width, 2 * c.heads * c.head_width, bias=False)
        self.gate = nn.Linear(c.width, c.heads * c.slots)
        self.norm = nn.RMSNorm(c.query_heads * c.head_width)
        self.out = nn.Linear(c.query_heads * c.head_width, c.width, bias=False)

    def forward(self, x: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """A whole sequence, or a piece of one that goes on from `states`; returns the states after it."""
        o, states = fla_ops.gsa(*self._inputs(x), initial_state=states, output_final_state=True)
        return self._output(o), states

    def step(self, x: Tensor, states: States) -> Tensor:
        """One step, x [B, width] to [B, width]; the states are updated in place."""
        o = fla_ops.gsa_step_(*self._inputs(x), *states)
        return self._output(o)

    def new_states(self, batch: int) -> States:
        """The states before the first step."""
        c, device = self.config, self.out.weight.device
        shape = (batch, c.heads, c.head_width, c.slots)
        return torch.zeros(shape, device=device), torch.zeros(*shape[:2], c.slots, c.head_width, device=device)

    def _inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, s and g, each [..., heads, width of a head]."""
        c = self.config
        q = F.silu(self.query(x)).unflatten(-1, (c.query_heads, -1))
        k, v = F.silu(self.key_value(x)).unflatten(-1, (2, c.heads, -1)).unbind(-3)
        g = F.logsigmoid(self.gate(x).float()).unflatten(-1, (c.heads, -1)) / c.normaliser
        return q, k, v, -g.expm1(), g

    def _output(self, o: Tensor) -> Tensor:
        return self.out(self.norm(F.silu(o.flatten(-2))))


class Model(nn.Module):
    """Bytes in, logits of the next byte out: layers of gated slot attention and gated MLPs."""

    def __init__(self, c: LayerConfig, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, c.width)
        self.mixers = nn.ModuleList(GatedSlotAttention(c) for _ in range(layers))
        self.mlps = nn.ModuleList(GatedMLP(c.width, 2 * c.width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(c.width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(c.width, BYTES, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[States]]:
        """Logits [B, T, 256] for tokens [B, T], and each layer's states after them."""
        x, states = self.embed(tokens), []
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            mixed, after = mixer(self.norms[2 * i](x))
            x = x + mixed
            x = x + mlp(self.norms[2 * i + 1](x))
            states.append(after)
        return self.head(self.norms[-1](x)), states

    def step(self, tokens: Tensor, states: list[States]) -> Tensor:
        """Logits [B, 256] for tokens [B]; the states move on in place."""
        x = self.embed(tokens)
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer.step(self.norms[2 * i](x), states[i])
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


def train(model: Model, text: Tensor, steps: int, batch: int, length: int) -> list[float]:
    """Bits per byte of each step, with the whole loss compiled as one graph."""

    @torch.compile(fullgraph=True)
    def loss_of(tokens: Tensor) -> Tensor:
        logits, _ = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / math.log(2)

    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for i in range(steps):
        loss = loss_of(random_windows(text, batch, length, seed=i))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if i % 10 == 0 or i == steps - 1:
            print(f"  step {i:4d}   {losses[-1]:.3f} bits per byte")
    return losses


@torch.no_grad()
def decode_error(model: Model, tokens: Tensor, prompt: int) -> float:
    """The largest difference between decoding after a prompt and one prefill, relative to the largest logit."""
    expected, _ = model(tokens)
    _, states = model(tokens[:, :prompt])
    logits = torch.stack([model.step(tokens[:, t], states) for t in range(prompt, tokens.shape[1])], 1)
    expected = expected[:, prompt:]
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    """Train, then compare decoding with the prefill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="bytes in a training window")
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model(LayerConfig(), arguments.layers).to(device)
    text = python_library()
    start = time.perf_counter()
    losses = train(model, text.train.to(device), arguments.steps, arguments.batch, arguments.length)
    print(f"trained in {time.perf_counter() - start:.0f} s: {losses[0]:.2f} to {losses[-1]:.2f} bits per byte")

    prompt, new = 200, 100
    tokens = random_windows(text.held_out.to(device), 2, prompt + new - 1, seed=0)
    error = decode_error(model, tokens, prompt)
    verdict = "equal" if error < 1e-4 else "DIFFERENT"
    print(f"{new} steps decoded after a prompt of {prompt}: {verdict} to the prefill (relative difference {error:.1e})")


if __name__ == "__main__":
    main()
