"""The arguments of gsa's forms and of its decode step, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fla_ops.signature import Gradient, Pool, Recurrence, Signature, Size, scale_or_default

# The axes of every tensor. A size is bound by the first tensor that has its letter; the others must agree.
AXES = {
    "q": "B T HQ K",
    "v": "B T H V",
    "s": "B T H M",
    "k": "B T H K",
    "g": "B T H M",
    "cu_seqlens": "N+1",
    "cu_seqlens_cpu": "N+1",
    "initial_k": "N H K M (initial_state[0])",
    "initial_v": "N H M V (initial_state[1])",
    "o": "B T HQ V",
    "final_k": "N H K M",
    "final_v": "N H M V",
    "earlier": "B T HQ M",
    "own": "B T HQ",
    "states_k": "C H K M",
    "states_v": "C H M V",
}
GATED = Recurrence({"initial_k": ("k", "s"), "initial_v": ("s", "v")}, decays=("g",))
STEP_AXES = {
    "q": "N HQ K",
    "v": "N H V",
    "s": "N H M",
    "state_k": "P H K M",
    "k": "N H K",
    "g": "N H M",
    "slots": "N",
    "state_v": "P H M V",
    "o": "N HQ V",
}
ADVANCE_AXES = {
    "k": "N T H K",
    "v": "N T H V",
    "s": "N T H M",
    "state_k": "P H K M",
    "g": "N T H M",
    "accepted": "N",
    "slots": "N",
    "state_v": "P H M V",
}
RECORD_AXES = {
    "k": "B T H K",
    "v": "B T H V",
    "s": "B T H M",
    "g": "B T H M",
    "q": "B T HQ K",
    "cu_seqlens": "N+1",
    "cu_seqlens_cpu": "N+1",
    "initial_k": "N H K M (initial_state[0])",
    "initial_v": "N H M V (initial_state[1])",
    "at": "N A",
    "o": "B T HQ V",
    "states_k": "C H K M",
    "states_v": "C H M V",
    "final_k": "N H K M",
    "final_v": "N H M V",
}
STOPPED_AXES = RECORD_AXES | {"states_k": "N A H K M", "states_v": "N A H M V"}
PREFILL_AXES = {
    "q": "B T HQ K",
    "v": "B T H V",
    "s": "B T H M",
    "cu_seqlens": "N+1",
    "cu_seqlens_cpu": "N+1",
    "state_k": "P H K M",
    "k": "B T H K",
    "g": "B T H M",
    "slots": "N",
    "fresh": "N",
    "state_v": "P H M V",
    "o": "B T HQ V",
}


class Call(NamedTuple):
    """One call of a form."""

    q: Tensor
    k: Tensor
    v: Tensor
    s: Tensor
    g: Tensor | None = None
    scale: float | None = None
    initial_k: Tensor | None = None
    initial_v: Tensor | None = None
    output_final_state: bool = False
    reverse: bool = False
    checkpoint_level: int = 2
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    chunk_size: int = 64
    mode: str = "auto"

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return AXES

    @property
    def recurrence(self) -> Recurrence | None:
        """What a piece of time does to the states; without g it depends on all steps before."""
        return None if self.g is None else GATED

    @property
    def factor(self) -> float:
        """What q is multiplied by."""
        return scale_or_default(self.scale, self.q)

    @property
    def sequences(self) -> Size:
        """N, the sequences of the batch or of the pack."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shapes(self) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
        """[N, H, K, M] and [N, H, M, V]."""
        lead, slots = (self.sequences, self.v.shape[2]), self.s.shape[3]
        return (*lead, self.q.shape[3], slots), (*lead, slots, self.v.shape[3])

    @property
    def chunk_steps(self) -> int:
        """Steps between two chunk states: a larger chunk is cut, so that a chunk of a kernel fits its registers."""
        return min(self.chunk_size, 64 if self.q.dtype in (torch.bfloat16, torch.float16) else 32)

    @property
    def chunks(self) -> Size:
        """How many chunk states a call has; for packed sequences, how many it may have at most."""
        steps, (batch, time) = self.chunk_steps, self.q.shape[:2]
        if self.cu_seqlens is None:
            return batch * ((time + steps - 1) // steps)
        return (time + self.sequences * (steps - 1)) // steps


def pool_axes(c: Any) -> dict[str, str]:
    """The axes of the pools that a call updates."""
    rows, notes = ("N", ["without slots"]) if c.slots is None else ("P", [])
    layouts = ("M K", "V M") if c.state_v_first else ("K M", "M V")
    notes = ["state_v_first=True"] * c.state_v_first + notes
    note = f" ({', '.join(notes)})" if notes else ""
    return {name: f"{rows} H {axes}{note}" for name, axes in zip(("state_k", "state_v"), layouts, strict=True)}


class Step(NamedTuple):
    """One decode step."""

    q: Tensor
    k: Tensor
    v: Tensor
    s: Tensor
    g: Tensor
    state_k: Pool
    state_v: Pool
    scale: float | None = None
    slots: Tensor | None = None
    state_v_first: bool = False

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this step."""
        return STEP_AXES | pool_axes(self)

    @property
    def pools(self) -> tuple[Tensor, Tensor]:
        """The states as [P, H, K, M] and [P, H, M, V], in place."""
        return (self.state_k.mT, self.state_v.mT) if self.state_v_first else (self.state_k, self.state_v)

    @property
    def factor(self) -> float:
        """What q is multiplied by."""
        return scale_or_default(self.scale, self.q)


class Record(NamedTuple):
    """Sequences whose states are wanted after every few steps, or after given numbers of them."""

    k: Tensor
    v: Tensor
    s: Tensor
    g: Tensor
    initial_k: Tensor | None = None
    initial_v: Tensor | None = None
    every: int = 64
    q: Tensor | None = None
    scale: float | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    chunk_size: int = 64
    at: Tensor | None = None

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return RECORD_AXES if self.at is None else STOPPED_AXES

    @property
    def rows(self) -> Size:
        """C, how many states there are; for packed sequences, how many there may be at most."""
        return self.k.shape[0] * (self.k.shape[1] // self.every)

    def call(self) -> Call:
        """The form's call, which keeps the states before each chunk; without queries, keys stand for them."""
        shared: dict[str, Any] = {name: getattr(self, name) for name in Call._fields if name in self._fields}
        q = self.k if self.q is None else self.q
        return Call(**shared | {"q": q}, output_final_state=True, checkpoint_level=0)


class Advance(NamedTuple):
    """Some of the steps that were drafted for each sequence, taken into its rows of both pools."""

    k: Tensor
    v: Tensor
    s: Tensor
    g: Tensor
    state_k: Pool
    state_v: Pool
    accepted: Tensor
    slots: Tensor | None = None
    state_v_first: bool = False

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return ADVANCE_AXES | pool_axes(self)

    @property
    def pools(self) -> tuple[Tensor, Tensor]:
        """The states as [P, H, K, M] and [P, H, M, V], in place."""
        return (self.state_k.mT, self.state_v.mT) if self.state_v_first else (self.state_k, self.state_v)


class Prefill(NamedTuple):
    """Sequences of any lengths, from rows of both pools to the same rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    s: Tensor
    g: Tensor
    state_k: Pool
    state_v: Pool
    scale: float | None = None
    slots: Tensor | None = None
    fresh: Tensor | None = None
    state_v_first: bool = False
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    chunk_size: int = 64

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return PREFILL_AXES | pool_axes(self)

    @property
    def pools(self) -> tuple[Tensor, Tensor]:
        """The states as [P, H, K, M] and [P, H, M, V], in place."""
        return (self.state_k.mT, self.state_v.mT) if self.state_v_first else (self.state_k, self.state_v)

    def call(self, initial_k: Tensor, initial_v: Tensor) -> Call:
        """The form's call from states to states that are returned."""
        shared: dict[str, Any] = {name: getattr(self, name) for name in Call._fields if name in self._fields}
        return Call(**shared, initial_k=initial_k, initial_v=initial_v, output_final_state=True)


class Outputs(NamedTuple):
    """What the forms return."""

    o: Tensor
    final_k: Tensor | None
    final_v: Tensor | None


class Recorded(NamedTuple):
    """Outputs where there are queries, the states on the way, and those after the last step."""

    o: Tensor | None
    states_k: Tensor
    states_v: Tensor
    final_k: Tensor
    final_v: Tensor


class Kept(NamedTuple):
    """What the chunk form returns, and what it keeps for its gradient.

    `earlier` is the strictly causal part of the softmax's argument, what a query reads from the steps before its own;
    `own` is the diagonal, the weight of its own step's memory slots. The states are those before each chunk.
    """

    o: Tensor
    final_k: Tensor | None
    final_v: Tensor | None
    earlier: Tensor | None
    own: Tensor | None
    states_k: Tensor | None
    states_v: Tensor | None


class Gradients(NamedTuple):
    """What a backward operator returns; None where it is not needed."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    s: Tensor | None
    g: Tensor | None
    initial_k: Tensor | None
    initial_v: Tensor | None


class Need(NamedTuple):
    """Which inputs' gradients are wanted."""

    q: bool
    k: bool
    v: bool
    s: bool
    g: bool
    initial_k: bool
    initial_v: bool

    def of_gates(self, g: Tensor | None) -> Need:
        """What to compute: without g, the gradient of s follows from those of ABC's weights and gates."""
        return self if g is not None else self._replace(g=self.s)


CHUNK = Signature("chunk_gsa", Call, Outputs, without=("reverse", "mode"))
CHUNK_FORWARD = Signature("chunk_gsa_forward", Call, Kept, without=("reverse", "mode"), last=("checkpoint_level",))
RECURRENT = Signature("fused_recurrent_gsa", Call, Outputs, without=("checkpoint_level", "chunk_size", "mode"))
STEP = Signature("gsa_step_", Step, "Tensor")
PREFILL = Signature("gsa_prefill_", Prefill, "Tensor")
RECORD = Signature("gsa_states", Record, Recorded)
ADVANCE = Signature("gsa_advance_", Advance, "()")
DISPATCHER = Signature("gsa", Call, Outputs, last=("reverse", "mode"))

CHUNK_GRADIENT = Gradient(
    CHUNK_FORWARD,
    Need,
    forward_only=("output_final_state", "checkpoint_level"),
    kept=("earlier", "own", "states_k", "states_v"),
)
RECURRENT_GRADIENT = Gradient(RECURRENT, Need)
