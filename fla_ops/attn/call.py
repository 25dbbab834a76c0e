"""The arguments of attn's forms and of its decode step, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fla_ops.signature import Gradient, Signature, Size, scale_or_default

FORGETS = -5000.0  # a log decay at or below this forgets everything: no score makes up for it
RESIDUAL_SCALE = 2048.0  # the rounding residual is kept times this, so that float16 can hold it

# Where the queries' steps lie: they are the keys' own, they are the last of them, or they come after all of them.
SAME, LAST, AFTER = "same", "last", "after"

# The axes of every tensor. A size is bound by the first tensor that has its letter; the others must agree.
AXES = {
    "q": "B T HQ K",
    "k": "B T H K",
    "v": "B T H V",
    "g": "B T HQ",
    "sink_bias": "HQ",
    "cu_seqlens": "N+1",
    "chunk_indices": "chunks 2",
    "o": "B T HQ V",
    "lse": "B T HQ",
    "rest": "B T HQ V",
}
PREFILL_AXES = {
    "q": "B T HQ K",
    "k": "B TK H K",
    "v": "B TK H V",
    "g": "B TK HQ",
    "decay": "B T HQ",
    "sink_bias": "HQ",
    "cu_seqlens": "N+1",
    "cu_seqlens_k": "N+1",
    "o": "B T HQ V",
    "lse": "B T HQ",
    "rest": "B T HQ V",
}
DECODING_AXES = {
    "cu_seqlens": "N+1",
    "q": "1 N HQ K",
    "k": "1 T H K",
    "v": "1 T H V",
    "g": "1 T HQ",
    "sink_bias": "HQ",
    "o": "1 N HQ V",
}


class Call(NamedTuple):
    """One call of a form."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    scale: float | None = None
    window_size: Size | None = None
    cu_seqlens: Tensor | None = None
    chunk_indices: Tensor | None = None
    do_gate_scale: bool = False
    sink_bias: Tensor | None = None
    mode: str = "auto"
    output_rest: bool = False

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return AXES

    @property
    def factor(self) -> float:
        """What scores are multiplied by."""
        return scale_or_default(self.scale, self.q)

    @property
    def sequences(self) -> Size:
        """N, the sequences of the batch or of the pack."""
        return self.k.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def place(self) -> str:
        """Where the queries' steps lie among the keys'."""
        return SAME

    @property
    def key_offsets(self) -> Tensor | None:
        """Offsets of the sequences in k, v and g."""
        return self.cu_seqlens

    def ahead(self, queries: Any, keys: Any) -> Any:
        """How many steps after the first key of a sequence its first query lies."""
        return 0

    @property
    def softcap(self) -> float | None:
        """None: only the rectangular form caps scores."""
        return None

    @property
    def gap(self) -> Size | None:
        """None: every step has a query and a key."""
        return None

    @property
    def decay(self) -> Tensor | None:
        """None: all decay is that of g."""
        return None


class Prefill(NamedTuple):
    """One call of the rectangular form: queries at the last steps of their keys, or after all of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    scale: float | None = None
    window_size: Size | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    sink_bias: Tensor | None = None
    softcap: float | None = None
    gap: Size | None = None
    decay: Tensor | None = None
    output_rest: bool = False

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return PREFILL_AXES

    @property
    def factor(self) -> float:
        """What scores are multiplied by."""
        return scale_or_default(self.scale, self.q)

    @property
    def sequences(self) -> Size:
        """N, the sequences of the batch or of the pack."""
        return self.k.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def place(self) -> str:
        """Where the queries' steps lie among the keys'."""
        return LAST if self.gap is None else AFTER

    @property
    def key_offsets(self) -> Tensor | None:
        """Offsets of the sequences in k, v and g."""
        return self.cu_seqlens_k

    def ahead(self, queries: Any, keys: Any) -> Any:
        """How many steps after the first key of a sequence its first query lies, from its numbers of both."""
        return keys - queries if self.gap is None else keys + self.gap


class Decoding(NamedTuple):
    """One decode step: a query for each of the caches that are packed into k, v and g."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    scale: float | None
    cu_seqlens: Tensor
    do_gate_scale: bool = False
    sink_bias: Tensor | None = None
    window_size: Size | None = None

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this step."""
        return DECODING_AXES

    @property
    def factor(self) -> float:
        """What scores are multiplied by."""
        return scale_or_default(self.scale, self.q)


class Outputs(NamedTuple):
    """What the parallel form returns and keeps.

    o     in q's dtype
    lse   the logarithm of each row's softmax denominator, with which parts of one attention that were computed apart
          can be joined
    rest  if asked for, the rounding residual of o in half precision. The gradient of the scores is a difference with
          do . o, and where a row attends to few keys little but o's rounding would be left of it.
    """

    o: Tensor
    lse: Tensor
    rest: Tensor | None


Gradients = tuple[Tensor | None, ...]  # one for each field of Need


class Joinable(NamedTuple):
    """What the rectangular form returns."""

    o: Tensor
    lse: Tensor


class Need(NamedTuple):
    """Which inputs' gradients are wanted."""

    q: bool
    k: bool
    v: bool
    g: bool
    sink_bias: bool

    @property
    def decay(self) -> bool:
        """False: there is no such input."""
        return False


class PrefillNeed(NamedTuple):
    """The same of the rectangular form."""

    q: bool
    k: bool
    v: bool
    g: bool
    sink_bias: bool
    decay: bool


FORWARD = Signature("parallel_attn_forward", Call, Outputs, without=("do_gate_scale", "mode"))
PARALLEL = Signature("parallel_attn", Call, "Tensor", without=(*FORWARD.without, "output_rest"))
PREFILL_FORWARD = Signature("attn_prefill_forward", Prefill, Outputs)
PREFILL = Signature("attn_prefill", Prefill, Joinable, without=("output_rest",))
DECODING = Signature("attn_decoding_one_step", Decoding, "Tensor")
DISPATCHER = Signature("attn", Call, "Tensor", without=("output_rest",))

GRADIENT = Gradient(
    FORWARD,
    Need,
    saved=("q", "k", "v", "g", "sink_bias", "cu_seqlens", "o", "lse", "rest"),
    forward_only=("output_rest",),
    kept=("rest",),
)
PREFILL_GRADIENT = Gradient(
    PREFILL_FORWARD,
    PrefillNeed,
    saved=("q", "k", "v", "g", "sink_bias", "cu_seqlens", "cu_seqlens_k", "decay", "o", "lse", "rest"),
    forward_only=("output_rest",),
    kept=("rest",),
)
