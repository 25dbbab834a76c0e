"""The language model for a server: the memories of many sequences are rows of pools, which one call reads and updates.

A call takes pieces of prompts and the newest bytes of sequences that are being written, together: the projections see
all of them as one batch. With drafted bytes, a sequence's newest byte and its drafts are read from a state that stays
as it is; then the state moves on by those that the model itself would have chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from language_model import LanguageModel, Layer, Mixer
from torch import Tensor, nn

import fla_ops


class Batch(NamedTuple):
    """What a call reads. Slot -1 is padding."""

    pieces: Tensor  # [T]: bytes of R prompts, end to end
    cu_seqlens: Tensor  # [R + 1]: where each piece begins, and T
    piece_slots: Tensor  # [R]
    fresh: Tensor  # [R] bool: pieces that begin their prompt
    tokens: Tensor  # [N, S]: of sequences that are being written, the newest byte and S - 1 drafted ones
    slots: Tensor  # [N]

    @property
    def size(self) -> int:
        """How many bytes the layers see."""
        return self.pieces.numel() + self.tokens.numel()


class Chosen(NamedTuple):
    """The most probable bytes, and how far each sequence moved on."""

    after_pieces: Tensor  # [R]: after the last byte of each piece
    after_tokens: Tensor  # [N, S]: after each of a sequence's tokens
    accepted: Tensor  # [N]: of the tokens, those that stand; the bytes after them are written


class Drafted(NamedTuple):
    """What a layer needs to move on by some of the tokens."""

    steps: Tensor  # [N, channels, window - 1 + S]: the convolution's inputs
    k: Tensor
    v: Tensor
    g: Tensor


class PooledMixer(nn.Module):
    """A mixer whose windows and states are rows of pools; the windows' last row serves padding."""

    def __init__(self, mixer: Mixer, rows: int) -> None:
        super().__init__()
        self.mixer = mixer
        window, channels = mixer.convolve.weight.shape
        key_width, value_width = mixer.widths[0] // mixer.heads, mixer.widths[2] // mixer.heads
        device = mixer.convolve.weight.device
        self.register_buffer("window", torch.zeros(rows + 1, channels, window - 1, device=device))
        self.register_buffer("state", torch.zeros(rows, mixer.heads, key_width, value_width, device=device))

    def forward(self, x: Tensor, batch: Batch) -> tuple[Tensor, Drafted | None]:
        """x [T + N * S, width], the pieces first, to the same."""
        projected, g, time = self.mixer.project(x), self.mixer.log_decay(x), len(batch.pieces)
        pieces = self._read(projected[None, :time], g[None, :time], batch)
        projected, g = (y[time:].unflatten(0, batch.tokens.shape) for y in (projected, g))
        if batch.tokens.shape[1] == 1:
            tokens, drafted = self._step(projected[:, 0], g[:, 0], batch), None
        else:
            tokens, drafted = self._verify(projected, g, batch)
        return self.mixer.output(torch.cat([pieces, tokens]), x), drafted

    def advance(self, drafted: Drafted, slots: Tensor, accepted: Tensor) -> None:
        """Move on by the accepted tokens [N] of each sequence."""
        last = accepted[:, None] + torch.arange(self.window.shape[-1], device=accepted.device)
        index = last[:, None].expand(-1, self.window.shape[1], -1)
        self.window[self._rows(slots)] = drafted.steps.gather(-1, index)
        fla_ops.simple_gla_advance_(drafted.k, drafted.v, self.state, accepted, drafted.g, slots=slots)

    def _read(self, projected: Tensor, g: Tensor, batch: Batch) -> Tensor:
        """Pieces of prompts, [1, T, channels] to [T, H, V]."""
        rows, cu_seqlens = self._rows(batch.piece_slots), batch.cu_seqlens
        window = self.window[rows].masked_fill(batch.fresh[:, None, None], 0)
        mixed, window = fla_ops.causal_conv(
            projected, self._taps, None, window, output_final_state=True, activation="silu", cu_seqlens=cu_seqlens
        )
        self.window[rows] = window
        q, k, v = self.mixer.by_head(mixed)
        return fla_ops.simple_gla_prefill_(
            q, k, v, self.state, g, slots=batch.piece_slots, fresh=batch.fresh, cu_seqlens=cu_seqlens
        )[0]

    def _step(self, projected: Tensor, g: Tensor, batch: Batch) -> Tensor:
        """One token of each sequence, [N, channels] to [N, H, V]."""
        mixed = fla_ops.causal_conv_step_(projected, self.window, self._taps, None, "silu", batch.slots)
        return fla_ops.simple_gla_step_(*self.mixer.by_head(mixed), self.state, g, slots=batch.slots)

    def _verify(self, projected: Tensor, g: Tensor, batch: Batch) -> tuple[Tensor, Drafted]:
        """Several tokens of each sequence, [N, S, channels] to [N * S, H, V], with the bits of as many steps."""
        window, state = self.window[self._rows(batch.slots)], self.state[batch.slots.clamp(min=0)]
        mixed, _ = fla_ops.causal_conv(projected, self._taps, None, window, activation="silu")
        q, k, v = self.mixer.by_head(mixed)
        o, _ = fla_ops.fused_recurrent_simple_gla(q, k, v, g, initial_state=state)
        return o.flatten(0, 1), Drafted(torch.cat([window, projected.mT], -1), k, v, g)

    @property
    def _taps(self) -> Tensor:
        return self.mixer.convolve.weight.T

    def _rows(self, slots: Tensor) -> Tensor:
        return torch.where(slots < 0, len(self.window) - 1, slots)


class PooledModel(nn.Module):
    """A language model with pools of so many rows."""

    def __init__(self, model: LanguageModel, rows: int) -> None:
        super().__init__()
        self.model, self.rows = model, rows
        self.mixers = nn.ModuleList(PooledMixer(layer.mixer, rows) for layer in model.layers)

    @property
    def device(self) -> torch.device:
        """Where the pools are."""
        return self.model.head.weight.device

    def forward(self, batch: Batch) -> Chosen:
        """Read the batch, and leave every sequence's row after what stands of it."""
        x, drafted = self.model.embed(torch.cat([batch.pieces, batch.tokens.flatten()])), []
        for layer, mixer in zip(self.model.layers, self.mixers, strict=True):
            x, of_layer = _layer(layer, mixer, x, batch)
            drafted.append(of_layer)
        ends = (batch.cu_seqlens[1:] - 1).clamp(min=0)
        x = torch.cat([x[ends], x[len(batch.pieces) :]])
        choice = self.model.head(self.model.norm(x)).argmax(-1)
        after_tokens = choice[len(ends) :].unflatten(0, batch.tokens.shape)
        agreed = (after_tokens[:, :-1] == batch.tokens[:, 1:]).long()
        accepted = 1 + agreed.cumprod(1).sum(1)  # the first token is no draft
        for mixer, of_layer in zip(self.mixers, drafted, strict=True):
            if of_layer is not None:
                mixer.advance(of_layer, batch.slots, accepted)
        return Chosen(choice[: len(ends)], after_tokens, accepted)

    def copy_row(self, source: int, target: int) -> None:
        """What a sequence has read so far, into another row."""
        for mixer in self.mixers:
            for pool in (mixer.window, mixer.state):
                pool[target].copy_(pool[source])


def _layer(layer: Layer, mixer: PooledMixer, x: Tensor, batch: Batch) -> tuple[Tensor, Drafted | None]:
    """`Layer.forward` with the pooled mixer."""
    mixed, drafted = mixer(layer.mixer_norm(x), batch)
    x = x + mixed
    return x + layer.mlp(layer.mlp_norm(x)), drafted
