"""The arguments of simple_gla's forms and of its decode step, and what follows from them."""

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
    "g": "B T H",
    "g_gamma": "H",
    "cu_seqlens": "N+1",
    "cu_seqlens_cpu": "N+1",
    "initial_state": "N H K V",
    "o": "B T H V",
    "final_state": "N H K V",
    "attn": "B H T T",
}
STATE_V_FIRST = AXES | {"initial_state": "N H V K (state_v_first=True)", "final_state": "N H V K"}
RECURRENCE = Recurrence({"initial_state": ("k", "v")}, decays=("g", "g_gamma"), reads=("q", "o"))
STEP_AXES = {
    "q": "N HK K",
    "v": "N H V",
    "state": "P H K V",
    "k": "N HK K",
    "g": "N H",
    "g_gamma": "H",
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
    g: Tensor | None = None
    g_gamma: Tensor | None = None
    scale: float | None = None
    initial_state: Tensor | None = None
    output_final_state: bool = False
    reverse: bool = False
    state_v_first: bool = False
    output_attentions: bool = False
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    chunk_size: int = 64
    mode: str = "auto"

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return STATE_V_FIRST if self.state_v_first else AXES

    @property
    def recurrence(self) -> Recurrence:
        """What a piece of time does to the state."""
        return RECURRENCE

    @property
    def factor(self) -> float:
        """What q is multiplied by."""
        return scale_or_default(self.scale, self.q)

    @property
    def sequences(self) -> Size:
        """N, the sequences of the batch or of the pack."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def turned(self) -> Call:
        """The same call with time the other way: steps from the last to the first, and so packed sequences."""
        q, k, v = self.q.flip(1), self.k.flip(1), self.v.flip(1)
        call = self._replace(q=q, k=k, v=v, g=flipped(self.g, 1), reverse=not self.reverse)
        if self.cu_seqlens is None:
            return call
        offsets = (self.cu_seqlens[-1] - self.cu_seqlens).flip(0)
        return call._replace(initial_state=flipped(self.initial_state, 0), cu_seqlens=offsets, cu_seqlens_cpu=None)

    @property
    def state_shape(self) -> tuple[Size, ...]:
        """[N, H, K, V], or [N, H, V, K] with state_v_first."""
        widths = (self.q.shape[3], self.v.shape[3])
        return (self.sequences, self.v.shape[2], *(widths[::-1] if self.state_v_first else widths))


def flipped(x: Tensor | None, axis: int) -> Tensor | None:
    """A tensor that may be absent, from its end to its start."""
    return None if x is None else x.flip(axis)


class Step(NamedTuple):
    """One decode step."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Pool
    g: Tensor | None = None
    g_gamma: Tensor | None = None
    scale: float | None = None
    slots: Tensor | None = None
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
    """What the forms with a state return."""

    o: Tensor
    final_state: Tensor | None

    def turned(self, packed: bool) -> Outputs:
        """Those of a call with time the other way."""
        return Outputs(self.o.flip(1), flipped(self.final_state, 0) if packed else self.final_state)


class Weighted(NamedTuple):
    """What the quadratic form returns."""

    o: Tensor
    attn: Tensor | None


Gradients = tuple[Tensor | None, ...]  # one for each field of Need or WeightsNeed


class Need(NamedTuple):
    """Which inputs' gradients are wanted."""

    q: bool
    k: bool
    v: bool
    g: bool
    g_gamma: bool
    initial_state: bool


class WeightsNeed(NamedTuple):
    """The same for the quadratic form, which has no state."""

    q: bool
    k: bool
    v: bool
    g: bool
    g_gamma: bool


def turned_gradients(found: Gradients, packed: bool) -> Gradients:
    """The gradients of a call with time the other way: of q, k, v and g, of g_gamma, of the initial state."""
    dg_gamma, dstate = found[4:]
    return (*(flipped(x, 1) for x in found[:4]), dg_gamma, flipped(dstate, 0) if packed else dstate)


CHUNK = Signature("chunk_simple_gla", Call, Outputs, without=("output_attentions", "mode"), last=("reverse",))
FUSED_CHUNK = Signature("fused_chunk_simple_gla", Call, Outputs, without=CHUNK.without, last=CHUNK.last)
RECURRENT = Signature("fused_recurrent_simple_gla", Call, Outputs, without=("output_attentions", "chunk_size", "mode"))
PARALLEL = Signature(
    "parallel_simple_gla",
    Call,
    Weighted,
    without=("initial_state", "output_final_state", "reverse", "state_v_first", "chunk_size", "mode"),
)
STEP = Signature("simple_gla_step_", Step, "Tensor")
DISPATCHER = Signature("simple_gla", Call, Outputs, without=("output_attentions",), last=("reverse", "mode"))

CHUNK_GRADIENT = Gradient(CHUNK, Need)
FUSED_CHUNK_GRADIENT = Gradient(FUSED_CHUNK, Need)
RECURRENT_GRADIENT = Gradient(RECURRENT, Need)
PARALLEL_GRADIENT = Gradient(PARALLEL, WeightsNeed, forward_only=("output_attentions",))
