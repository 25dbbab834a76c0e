"""A small byte-level language model whose layers mix time with `fla_ops.simple_gla`.

Three ways to run it, all with the same weights:

- `model(tokens)`: logits of every position at once, for training and for export;
- `model(tokens, memory)`: the same, reading and updating a memory, for a prompt or a piece of a long text;
- `model.step(tokens, memory)`: one byte per sequence, the memory updated in place, for generation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fla_ops

BYTES = 256


@dataclass(frozen=True)
class ModelConfig:
    """The hyper-parameters that fix the shapes and the meaning of the weights."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    key_width: int = 32  # of one head
    value_width: int = 64  # of one head
    hidden: int = 512  # of the gated MLP
    window: int = 4  # bytes that the short convolution sees
    gate_normaliser: float = 16.0  # decay = sigmoid(.) ** (1 / normaliser): larger remembers longer


@dataclass
class LayerMemory:
    """What one layer carries from step to step: its size does not grow with time."""

    window: Tensor  # [B, window - 1, channels]: the convolution's last inputs
    state: Tensor  # [B, H, K, V] float32: the state of simple_gla


Memory = list[LayerMemory]


class ShortConvolution(nn.Module):
    """A causal convolution of a few steps, each channel on its own."""

    def __init__(self, channels: int, window: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(window, channels))
        nn.init.normal_(self.weight, std=window**-0.5)

    def forward(self, x: Tensor, memory: LayerMemory | None) -> Tensor:
        """x [B, T, C] to [B, T, C]; the steps before the first are the memory's, or zeros."""
        time, before = x.shape[1], len(self.weight) - 1
        x = F.pad(x, (0, 0, before, 0)) if memory is None else torch.cat([memory.window.to(x.dtype), x], 1)
        if memory is not None:
            memory.window.copy_(x[:, time:])
        return self.over(x)

    def over(self, x: Tensor) -> Tensor:
        """[B, window - 1 + T, C], of which the first steps are only seen, to [B, T, C]."""
        time = x.shape[1] - len(self.weight) + 1
        y = x[:, :time] * self.weight[0]
        for i, weight in enumerate(self.weight[1:], 1):
            y = y + x[:, i : i + time] * weight
        return y


class Mixer(nn.Module):
    """Mixes time: gated linear attention (simple_gla) on convolved queries, keys and values, then a norm and a gate."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.normaliser = c.heads, c.gate_normaliser
        self.operator = fla_ops.simple_gla
        self.widths = [c.heads * c.key_width, c.heads * c.key_width, c.heads * c.value_width]
        self.project = nn.Linear(c.width, sum(self.widths), bias=False)
        self.convolve = ShortConvolution(sum(self.widths), c.window)
        self.decay = nn.Linear(c.width, c.heads)
        self.norm = nn.RMSNorm(c.value_width)
        self.gate = nn.Linear(c.width, c.heads * c.value_width, bias=False)
        self.out = nn.Linear(c.heads * c.value_width, c.width, bias=False)

    def forward(self, x: Tensor, memory: LayerMemory | None = None) -> Tensor:
        """x [B, T, width] to [B, T, width]."""
        q, k, v, g = self._inputs(x, memory)
        state = None if memory is None else memory.state
        o, final_state = self.operator(q, k, v, g, initial_state=state, output_final_state=memory is not None)
        if memory is not None:
            memory.state.copy_(final_state)
        return self.output(o, x)

    def step(self, x: Tensor, memory: LayerMemory) -> Tensor:
        """One step, x [B, 1, width] to [B, 1, width]; the operator updates memory.state in place."""
        q, k, v, g = (y.squeeze(1) for y in self._inputs(x, memory))
        o = fla_ops.simple_gla_step_(q, k, v, memory.state, g)
        return self.output(o.unsqueeze(1), x)

    def _inputs(self, x: Tensor, memory: LayerMemory | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q and k [B, T, H, K], v [B, T, H, V], and the log decay g [B, T, H] in float32."""
        return *self.by_head(F.silu(self.convolve(self.project(x), memory))), self.log_decay(x)

    def by_head(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k [..., H, K] and v [..., H, V] out of what the convolution leaves, [..., channels]."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in mixed.split(self.widths, -1))
        return q, k, v

    def log_decay(self, x: Tensor) -> Tensor:
        """[..., H], in float32."""
        return F.logsigmoid(self.decay(x).float()) / self.normaliser

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """o [..., H, V] and x [..., width] to [..., width]."""
        return self.out(self.norm(o).flatten(-2) * F.silu(self.gate(x)))


class GatedMLP(nn.Module):
    """Mixes channels: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(c.width), Mixer(c)
        self.mlp_norm, self.mlp = nn.RMSNorm(c.width), GatedMLP(c.width, c.hidden)

    def forward(self, x: Tensor, memory: LayerMemory | None = None, one_step: bool = False) -> Tensor:
        mix = self.mixer.step if one_step else self.mixer
        x = x + mix(self.mixer_norm(x), memory)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(BYTES, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, BYTES, bias=False)
        self._initialise()

    def forward(self, tokens: Tensor, memory: Memory | None = None) -> Tensor:
        """Logits [B, T, 256] of the byte after each of tokens [B, T]."""
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, None if memory is None else memory[i])
        return self.head(self.norm(x))

    def step(self, tokens: Tensor, memory: Memory) -> Tensor:
        """Logits [B, 256] of the byte after tokens [B]; the memory moves on by one step, in place."""
        x = self.embed(tokens[:, None])
        for layer, layer_memory in zip(self.layers, memory, strict=True):
            x = layer(x, layer_memory, one_step=True)
        return self.head(self.norm(x)).squeeze(1)

    def new_memory(self, batch: int) -> Memory:
        """The memory before the first byte of `batch` sequences."""
        c, device = self.config, self.head.weight.device
        channels = c.heads * (2 * c.key_width + c.value_width)
        return [
            LayerMemory(
                torch.zeros(batch, c.window - 1, channels, device=device),
                torch.zeros(batch, c.heads, c.key_width, c.value_width, device=device),
            )
            for _ in self.layers
        ]

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for layer in self.layers:
            for last in (layer.mixer.out, layer.mlp.down):  # so that the sum over layers keeps its size
                nn.init.normal_(last.weight, std=(2 * last.in_features * len(self.layers)) ** -0.5)
            nn.init.uniform_(layer.mixer.decay.bias, -2, 4)  # heads begin with a spread of memory lengths
        nn.init.normal_(self.embed.weight)
        nn.init.normal_(self.head.weight, std=0.5 * self.head.in_features**-0.5)


def cross_entropy(model: LanguageModel, tokens: Tensor) -> Tensor:
    """The mean loss in nats per byte over tokens [B, T + 1], each byte predicted from those before it."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
