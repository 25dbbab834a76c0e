"""The arguments of linear_attn's forms, of the normalisation and of their decode steps, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fla_ops.signature import Gradient, Pool, Recurrence, Signature, Size, scale_or_default

# The axes of every tensor. A size is bound by the first tensor that has its letter; the others must agree.
AXES = {
    "q": "B T HK K",
    "v": "B T H V",
    "k": "B T HK K",
    "cu_seqlens": "N+1",
    "cu_seqlens_cpu": "N+1",
    "initial_state": "N H K V",
    "initial_z": "N 1 H K",
    "o": "B T H V",
    "final_state": "N H K V",
    "final_z": "N 1 H K",
}
NORMALIZE_AXES = {
    "q": "B T HK K",
    "o": "B T H V",
    "k": "B T HK K",
    "cu_seqlens": "N+1",
    "cu_seqlens_cpu": "N+1",
    "initial_z": "N 1 H K",
    "normalized": "B T H V",
    "final_z": "N 1 H K",
}
RUNNING_SUM = Recurrence({"initial_z": ("k",)})
STEP_AXES = {
    "q": "N HK K",
    "v": "N H V",
    "z": "P 1 H K",
    "state": "P H K V",
    "k": "N HK K",
    "slots": "N",
    "o": "N H V",
}
WITHOUT_SLOTS = STEP_AXES | {"state": "N H K V (without slots)", "z": "N 1 H K (without slots)"}
STEP_V_FIRST = STEP_AXES | {"state": "P H V K (state_v_first=True)"}
STEP_V_FIRST_WITHOUT_SLOTS = WITHOUT_SLOTS | {"state": "N H V K (state_v_first=True, without slots)"}
NORMALIZE_STEP_AXES = {
    "q": "N HK K",
    "o": "N H V",
    "z": "P 1 H K",
    "k": "N HK K",
    "slots": "N",
    "normalized": "N H V",
}


class Call(NamedTuple):
    """One call of a form."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None = None
    initial_state: Tensor | None = None
    initial_z: Tensor | None = None
    output_final_state: bool = False
    reverse: bool = False
    normalize: bool = True
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    chunk_size: int = 64
    mode: str = "auto"

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return AXES

    @property
    def sequences(self) -> Size:
        """N, the sequences of the batch or of the pack."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class Normalize(NamedTuple):
    """One call of the normalisation: o_t / (scale q_t . z_t + 1e-10), z_t the running sum of k."""

    q: Tensor
    k: Tensor
    o: Tensor
    scale: float | None = 1.0
    initial_z: Tensor | None = None
    output_final_z: bool = False
    reverse: bool = False
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return NORMALIZE_AXES

    @property
    def recurrence(self) -> Recurrence:
        """What a piece of time does to the running sum."""
        return RUNNING_SUM

    @property
    def factor(self) -> float:
        """What q . z is multiplied by."""
        return scale_or_default(self.scale, self.q)

    @property
    def sequences(self) -> Size:
        """N, the sequences of the batch or of the pack."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class Step(NamedTuple):
    """One decode step of a normalised state."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Pool
    z: Pool
    scale: float | None = None
    slots: Tensor | None = None
    state_v_first: bool = False

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this step."""
        if self.slots is not None:
            return STEP_V_FIRST if self.state_v_first else STEP_AXES
        return STEP_V_FIRST_WITHOUT_SLOTS if self.state_v_first else WITHOUT_SLOTS


class NormalizeStep(NamedTuple):
    """One step of the normalisation."""

    q: Tensor
    k: Tensor
    o: Tensor
    z: Pool
    scale: float | None = 1.0
    slots: Tensor | None = None

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this step."""
        return NORMALIZE_STEP_AXES if self.slots is not None else NORMALIZE_STEP_AXES | {"z": "N 1 H K (without slots)"}

    @property
    def factor(self) -> float:
        """What q . z is multiplied by."""
        return scale_or_default(self.scale, self.q)


class Outputs(NamedTuple):
    """What the forms return."""

    o: Tensor
    final_state: Tensor | None
    final_z: Tensor | None


class Normalized(NamedTuple):
    """What the normalisation returns."""

    normalized: Tensor
    final_z: Tensor | None


Gradients = tuple[Tensor | None, ...]  # one for each field of Need


class Need(NamedTuple):
    """Which gradients of the normalisation are wanted."""

    q: bool
    k: bool
    o: bool
    initial_z: bool


CHUNK = Signature("chunk_linear_attn", Call, Outputs, without=("reverse", "mode"))
FUSED_CHUNK = Signature("fused_chunk_linear_attn", Call, Outputs, without=CHUNK.without)
RECURRENT = Signature(
    "fused_recurrent_linear_attn", Call, Outputs, without=("chunk_size", "mode"), defaults={"normalize": False}
)
DISPATCHER = Signature("linear_attn", Call, Outputs, last=("reverse", "mode"))
STEP = Signature("linear_attn_step_", Step, "Tensor")
NORMALIZE = Signature("normalize_output", Normalize, Normalized)
NORMALIZE_STEP = Signature("normalize_output_step_", NormalizeStep, "Tensor")

NORMALIZE_GRADIENT = Gradient(
    NORMALIZE,
    Need,
    saved=("q", "k", "normalized", "initial_z", "cu_seqlens"),
    forward_only=("output_final_z",),
)
