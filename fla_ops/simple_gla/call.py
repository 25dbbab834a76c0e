"""The arguments of simple_gla's forms and of its decode step, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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
    "states": "C H K V",
    "attn": "B H T T",
}
STATE_V_FIRST_AXES = {"initial_state": "N H V K (state_v_first=True)", "final_state": "N H V K"}
STATE_V_FIRST = AXES | STATE_V_FIRST_AXES
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
RECORD_AXES = {
    "k": "B T HK K",
    "v": "B T H V",
    "q": "B T HK K",
    "cu_seqlens": "N+1",
    "cu_seqlens_cpu": "N+1",
    "initial_state": "N H K V",
    "g": "B T H",
    "g_gamma": "H",
    "at": "N A",
    "o": "B T H V",
    "states": "C H K V",
    "final_state": "N H K V",
}
RECORD_V_FIRST = RECORD_AXES | STATE_V_FIRST_AXES | {"states": "C H V K"}
ADVANCE_AXES = {
    "k": "N T HK K",
    "v": "N T H V",
    "state": "P H K V",
    "accepted": "N",
    "g": "N T H",
    "g_gamma": "H",
    "slots": "N",
}
PREFILL_AXES = {
    "q": "B T HK K",
    "v": "B T H V",
    "cu_seqlens": "N+1",
    "cu_seqlens_cpu": "N+1",
    "state": "P H K V",
    "k": "B T HK K",
    "g": "B T H",
    "g_gamma": "H",
    "slots": "N",
    "fresh": "N",
    "o": "B T H V",
}


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


def pool_axes(c: Any) -> dict[str, str]:
    """The axes of the pool that a call updates."""
    layout, notes = ("V K", ["state_v_first=True"]) if c.state_v_first else ("K V", [])
    if c.slots is None:
        return {"state": f"N H {layout} ({', '.join([*notes, 'without slots'])})"}
    return {"state": f"P H {layout} ({', '.join(notes)})" if notes else f"P H {layout}"}


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
        return STEP_AXES | pool_axes(self)

    @property
    def pool(self) -> Tensor:
        """The states as [P, H, K, V], in place."""
        return self.state.mT if self.state_v_first else self.state

    @property
    def factor(self) -> float:
        """What q is multiplied by."""
        return scale_or_default(self.scale, self.q)


class Record(NamedTuple):
    """Sequences whose states are wanted after every few steps, or after given numbers of them."""

    k: Tensor
    v: Tensor
    g: Tensor | None = None
    g_gamma: Tensor | None = None
    initial_state: Tensor | None = None
    every: int = 64
    q: Tensor | None = None
    scale: float | None = None
    state_v_first: bool = False
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    chunk_size: int = 64
    at: Tensor | None = None

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        axes = RECORD_V_FIRST if self.state_v_first else RECORD_AXES
        return axes if self.at is None else axes | {"states": f"N A {axes['states'].removeprefix('C ')}"}

    @property
    def rows(self) -> Size:
        """C, how many states there are; for packed sequences, how many there may be at most."""
        return self.k.shape[0] * (self.k.shape[1] // self.every)

    def call(self) -> Call:
        """The form's call; without queries, keys stand for them."""
        shared: dict[str, Any] = {name: getattr(self, name) for name in Call._fields if name in self._fields}
        return Call(**shared | {"q": self.k if self.q is None else self.q}, output_final_state=True)


class Advance(NamedTuple):
    """Some of the steps that were drafted for each sequence, taken into its row of a pool."""

    k: Tensor
    v: Tensor
    state: Pool
    accepted: Tensor
    g: Tensor | None = None
    g_gamma: Tensor | None = None
    slots: Tensor | None = None
    state_v_first: bool = False

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return ADVANCE_AXES | pool_axes(self)

    @property
    def pool(self) -> Tensor:
        """The states as [P, H, K, V], in place."""
        return self.state.mT if self.state_v_first else self.state


class Prefill(NamedTuple):
    """Sequences of any lengths, from rows of a pool to the same rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Pool
    g: Tensor | None = None
    g_gamma: Tensor | None = None
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
    def pool(self) -> Tensor:
        """The states as [P, H, K, V], in place."""
        return self.state.mT if self.state_v_first else self.state

    @property
    def sequences(self) -> Size:
        """N, the sequences of the batch or of the pack."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def call(self, initial_state: Tensor | None = None) -> Call:
        """The form's call from states [N, H, K, V] to states that are returned."""
        shared: dict[str, Any] = {name: getattr(self, name) for name in Call._fields if name in self._fields}
        shared["state_v_first"] = False
        return Call(**shared, initial_state=initial_state, output_final_state=True)


class Outputs(NamedTuple):
    """What the forms with a state return."""

    o: Tensor
    final_state: Tensor | None

    def turned(self, packed: bool) -> Outputs:
        """Those of a call with time the other way."""
        return Outputs(self.o.flip(1), flipped(self.final_state, 0) if packed else self.final_state)


class Recorded(NamedTuple):
    """Outputs where there are queries, the states on the way, and those after the last step."""

    o: Tensor | None
    states: Tensor
    final_state: Tensor


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
RECORD = Signature("simple_gla_states", Record, Recorded)
ADVANCE = Signature("simple_gla_advance_", Advance, "()")
PREFILL = Signature("simple_gla_prefill_", Prefill, "Tensor")
DISPATCHER = Signature("simple_gla", Call, Outputs, without=("output_attentions",), last=("reverse", "mode"))

CHUNK_GRADIENT = Gradient(CHUNK, Need)
FUSED_CHUNK_GRADIENT = Gradient(FUSED_CHUNK, Need)
RECURRENT_GRADIENT = Gradient(RECURRENT, Need)
PARALLEL_GRADIENT = Gradient(PARALLEL, WeightsNeed, forward_only=("output_attentions",))
