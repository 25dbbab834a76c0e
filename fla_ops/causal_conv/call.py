"""The arguments of causal_conv and of its decode step, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fla_ops.signature import Gradient, Pool, Signature, Size

# The axes of every tensor. A size is bound by the first tensor that has its letter; the others must agree.
AXES = {
    "x": "B T D",
    "weight": "D W",
    "bias": "D",
    "cu_seqlens": "N+1",
    "cu_seqlens_cpu": "N+1",
    "initial_state": "N D W-1",
    "o": "B T D",
    "final_state": "N D W-1",
}
STEP_AXES = {"x": "N D", "state": "P D S", "weight": "D W", "bias": "D", "slots": "N", "o": "N D"}
WITHOUT_SLOTS = STEP_AXES | {"state": "N D S (without slots)"}


class Call(NamedTuple):
    """One call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    initial_state: Tensor | None = None
    output_final_state: bool = False
    activation: str | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return AXES

    @property
    def sequences(self) -> Size:
        """N, the sequences of the batch or of the pack."""
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[Size, ...]:
        """[N, D, W - 1]."""
        return (self.sequences, self.x.shape[2], self.weight.shape[1] - 1)


class Step(NamedTuple):
    """One decode step."""

    x: Tensor
    state: Pool
    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    slots: Tensor | None = None

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this step."""
        return WITHOUT_SLOTS if self.slots is None else STEP_AXES


class Outputs(NamedTuple):
    """What the convolution returns."""

    o: Tensor
    final_state: Tensor | None


Gradients = tuple[Tensor | None, ...]  # one for each field of Need


class Need(NamedTuple):
    """Which inputs' gradients are wanted."""

    x: bool
    weight: bool
    bias: bool
    initial_state: bool


CONV = Signature("causal_conv", Call, Outputs)
STEP = Signature("causal_conv_step_", Step, "Tensor")
GRADIENT = Gradient(CONV, Need)
