"""Text from a trained model: one byte at a time, the states of all layers updated in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from language_model import LanguageModel
from text import Text
from torch import Tensor

STREAMS, SEGMENT = 16, 1024


@torch.no_grad()
def generate(model: LanguageModel, prompt: bytes, length: int, temperature: float = 0.7, seed: int = 0) -> bytes:
    """The prompt and `length` bytes after it. The prompt is one prefill; each byte after it is one step."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    memory = model.new_memory(1)
    logits = model(torch.tensor([list(prompt)], device=device), memory)[:, -1]
    written = bytearray(prompt)
    for _ in range(length):
        probability = F.softmax(logits[0].float().cpu() / temperature, -1)
        byte = int(torch.multinomial(probability, 1, generator=generator))
        written.append(byte)
        logits = model.step(torch.tensor([byte], device=device), memory)
    return bytes(written)


@torch.no_grad()
def greedy(model: LanguageModel, prompt: bytes, length: int) -> tuple[bytes, list[float]]:
    """The most probable bytes after a prompt, and by how much the logit of each exceeds the next best."""
    device = next(model.parameters()).device
    memory = model.new_memory(1)
    logits = model(torch.tensor([list(prompt)], device=device), memory)[:, -1]
    written, margins = bytearray(), []
    for _ in range(length):
        (best, other), (byte, _) = (x[0].tolist() for x in logits.topk(2))
        written.append(byte)
        margins.append(best - other)
        logits = model.step(torch.tensor([byte], device=device), memory)
    return bytes(written), margins


@torch.no_grad()
def decode_difference(model: LanguageModel, tokens: Tensor, prompt: int) -> float:
    """The largest difference between the logits of one prefill over tokens [B, T], and of steps after a `prompt`."""
    expected, memory = model(tokens), model.new_memory(len(tokens))
    model(tokens[:, :prompt], memory)
    steps = [model.step(tokens[:, t], memory) for t in range(prompt, tokens.shape[1])]
    return (torch.stack(steps, 1) - expected[:, prompt:]).abs().max().item()


@torch.no_grad()
def bits_per_byte(model: LanguageModel, text: Tensor) -> float:
    """How well the model predicts text, as a few streams that are read segment by segment, the memory carried on."""
    device = next(model.parameters()).device
    streams = text[: len(text) // STREAMS * STREAMS].view(STREAMS, -1).long().to(device)
    given = F.pad(streams, (1, -1), value=ord("\n"))
    memory, nats = model.new_memory(STREAMS), 0.0
    for tokens, targets in zip(given.split(SEGMENT, 1), streams.split(SEGMENT, 1), strict=True):
        logits = model(tokens, memory).float()
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return nats / streams.numel() / torch.log(torch.tensor(2.0)).item()


def sample_of(model: LanguageModel, text: Text, length: int = 1200) -> str:
    """A prompt from the held-out text and what the model makes of it."""
    prompt = bytes(text.held_out[:200].tolist())
    return generate(model, prompt, length).decode(errors="replace")
