"""The arguments of the gated delta rule's forms and of its decode step, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fla_ops.signature import Gradient, Pool, Signature, Size, scale_or_default

# The axes of every tensor. A size is bound by the first tensor that has its letter; the others must agree.
AXES = {
    "q": "B T HK K",
    "v": "B T H V",
    "k": "B T HK K",
    "g": "B T H",
    "beta": "B T H",
    "cu_seqlens": "N+1",
    "cu_seqlens_cpu": "N+1",
    "initial_state": "N H K V",
    "o": "B T H V",
    "final_state": "N H K V",
}
STATE_V_FIRST = AXES | {"initial_state": "N H V K (state_v_first=True)", "final_state": "N H V K"}
STEP_AXES = {
    "q": "N HK K",
    "v": "N H V",
    "state": "P H K V",
    "k": "N HK K",
    "g": "N H",
    "beta": "N H",
    "slots": "N",
    "o": "N H V",
}
WITHOUT_SLOTS = STEP_AXES | {"state": "N H K V (without slots)"}
STEP_V_FIRST = STEP_AXES | {"state": "P H V K (state_v_first=True)"}
STEP_V_FIRST_WITHOUT_SLOTS = STEP_AXES | {"state": "N H V K (state_v_first=True, without slots)"}


class Call(NamedTuple):
    """One call of a form."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor
    scale: float | None = None
    initial_state: Tensor | None = None
    output_final_state: bool = False
    use_qk_l2norm_in_kernel: bool = False
    state_v_first: bool = False
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    chunk_size: int = 64
    mode: str = "auto"

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return STATE_V_FIRST if self.state_v_first else AXES

    @property
    def factor(self) -> float:
        """What q is multiplied by."""
        return scale_or_default(self.scale, self.q)

    @property
    def sequences(self) -> Size:
        """N, the sequences of the batch or of the pack."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[Size, ...]:
        """[N, H, K, V], or [N, H, V, K] with state_v_first."""
        widths = (self.q.shape[3], self.v.shape[3])
        return (self.sequences, self.v.shape[2], *(widths[::-1] if self.state_v_first else widths))

    @property
    def reverse(self) -> bool:
        """Whether time runs backwards: it never does."""
        return False


class Step(NamedTuple):
    """One decode step."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Pool
    g: Tensor | None
    beta: Tensor
    scale: float | None = None
    slots: Tensor | None = None
    use_qk_l2norm_in_kernel: bool = False
    state_v_first: bool = False

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this step."""
        if self.state_v_first:
            return STEP_V_FIRST_WITHOUT_SLOTS if self.slots is None else STEP_V_FIRST
        return WITHOUT_SLOTS if self.slots is None else STEP_AXES

    @property
    def pool(self) -> Tensor:
        """The states as [P, H, K, V], in place."""
        return self.state.mT if self.state_v_first else self.state

    @property
    def factor(self) -> float:
        """What q is multiplied by."""
        return scale_or_default(self.scale, self.q)


class Outputs(NamedTuple):
    """What the forms return."""

    o: Tensor
    final_state: Tensor | None


Gradients = tuple[Tensor | None, ...]  # one for each field of Need


class Need(NamedTuple):
    """Which inputs' gradients are wanted."""

    q: bool
    k: bool
    v: bool
    g: bool
    beta: bool
    initial_state: bool


CHUNK = Signature("chunk_gated_delta_rule", Call, Outputs, without=("mode",))
RECURRENT = Signature("fused_recurrent_gated_delta_rule", Call, Outputs, without=("chunk_size", "mode"))
STEP = Signature("gated_delta_rule_step_", Step, "Tensor")
DISPATCHER = Signature("gated_delta_rule", Call, Outputs)

CHUNK_GRADIENT = Gradient(CHUNK, Need)
RECURRENT_GRADIENT = Gradient(RECURRENT, Need)
