"""The arguments of an operator, declared once.

Each family has a NamedTuple, its *call*: every argument of its forms, with types and defaults, and what follows from
them. A `Signature` picks the fields that one operator takes. Its schema comes from the fields' annotations, and it
turns the operator's positional arguments into a call and back:

    CHUNK = Signature("chunk_simple_gla", Call, Outputs, without=("reverse", "mode"))
    CHUNK.schema                        "chunk_simple_gla(Tensor q, Tensor k, ...) -> (Tensor o, Tensor? final_state)"
    CHUNK.call_of((q, k, v))            Call(q, k, v, g=None, ...)
    CHUNK.arguments_of(call)            (q, k, v, None, ...)

A `Gradient` adds what differentiates it: the schema of the backward operator follows from both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor

Size = Any  # int or torch.SymInt
Pool = Tensor  # a tensor that the operator updates in place

SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "Pool": "Tensor({}!)",
    "Size": "SymInt",
    "Size | None": "SymInt?",
    "int": "int",
    "bool": "bool",
    "float | None": "float?",
    "str": "str",
    "str | None": "str?",
    "torch.dtype | None": "ScalarType?",
    "torch.device | None": "Device?",
}


@dataclass(frozen=True)
class Recurrence:
    """What a piece of time does to the states of a call: `final = exp(sum of decays) * initial + sum of products`.

    adds    by state (`initial_x`, whose end is `final_x`), the inputs whose product a step adds to it
    decays  inputs that hold the natural logarithm of what a step keeps of the states; those that are None keep all
    reads   where an output is linear in the state, the input that reads it and that output

    Axes say which heads and widths meet. A property `recurrence` of a call returns this, or None where the states
    follow another rule; a sequence that several processes share is then exchanged by its states alone.
    """

    adds: Mapping[str, tuple[str, ...]]
    decays: tuple[str, ...] = ()
    reads: tuple[str, str] | None = None


@dataclass(frozen=True)
class Signature:
    """One operator's arguments and results.

    name      under torch.ops.fla
    call      the NamedTuple of its family
    outputs   the NamedTuple of its results, "Tensor" for a single one, or "()" for none
    without   fields of the call that the operator does not take; they keep their defaults
    last      fields that the schema puts at its end, in this order
    defaults  where the operator's default is not the call's
    """

    name: str
    call: type[Any]
    outputs: Any
    without: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fields: tuple[str, ...] = field(init=False)
    _values: tuple[Any, ...] = field(init=False)
    _pick: Any = field(init=False)
    _unpick: Any = field(init=False)

    def __post_init__(self) -> None:
        """Find the positions of the fields in the schema and in the call."""
        taken = [name for name in self.call._fields if name not in (*self.without, *self.last)]
        fields = (*taken, *self.last)
        absent = tuple(name for name in self.call._fields if name not in fields)
        order = (*fields, *absent)
        values = {**dict.fromkeys(order), **self.call._field_defaults, **self.defaults}
        object.__setattr__(self, "fields", fields)
        object.__setattr__(self, "_values", tuple(values[name] for name in order))
        object.__setattr__(self, "_pick", itemgetter(*(order.index(name) for name in self.call._fields)))
        object.__setattr__(self, "_unpick", attrgetter(*fields))

    def call_of(self, arguments: Sequence[Any]) -> Any:
        """The call of some positional arguments; trailing ones that are missing take their defaults."""
        return self.call._make(self._pick((*arguments, *self._values[len(arguments) :])))

    def arguments_of(self, call: Any) -> tuple[Any, ...]:
        """The operator's positional arguments, from a call that has its fields."""
        arguments: tuple[Any, ...] = self._unpick(call)
        return arguments

    def type_of(self, name: str) -> str:
        """The annotation of a field, as it is written."""
        return written_types(self.call)[name]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The fields that hold tensors."""
        return tuple(name for name in self.fields if self.type_of(name) in ("Tensor", "Tensor | None", "Pool"))

    @property
    def mutated(self) -> tuple[str, ...]:
        """The fields that are updated in place."""
        return tuple(name for name in self.fields if self.type_of(name) == "Pool")

    @property
    def results(self) -> tuple[str, ...]:
        """The names of what it returns."""
        if isinstance(self.outputs, str):
            return ("o",) if self.outputs == "Tensor" else ()
        return tuple(self.outputs._fields)

    def returned(self, results: Any) -> Any:
        """What the operator returns, from what an implementation does: a single result is no tuple."""
        return results[0] if not isinstance(self.outputs, str) and len(self.outputs._fields) == 1 else results

    @property
    def schema(self) -> str:
        """The schema that is registered."""
        optional = {**self.call._field_defaults, **self.defaults}
        arguments, aliases = [], iter("abc")
        for name in self.fields:
            kind = SCHEMA_TYPES[self.type_of(name)]
            kind = kind.format(next(aliases)) if "{}" in kind else kind
            arguments.append(f"{kind} {name}{_default(optional[name]) if name in optional else ''}")
        return f"{self.name}({', '.join(arguments)}) -> {self.returns}"

    @property
    def returns(self) -> str:
        """The part of the schema after the arrow."""
        if isinstance(self.outputs, str):
            return self.outputs
        fields = (f"{SCHEMA_TYPES[kind]} {name}" for name, kind in written_types(self.outputs).items())
        return f"({', '.join(fields)})"


@dataclass(frozen=True)
class Gradient:
    """What differentiates an operator: its backward operator's arguments follow from this and the signature.

    of            the operator that is differentiated
    need          the NamedTuple of flags, one for each input that has a gradient
    saved         inputs and outputs that the backward operator reads, in its order; unless given, all input tensors
    forward_only  settings that do not matter to the gradient
    kept          outputs without a gradient of their own, which exist to be saved
    """

    of: Signature
    need: type[Any]
    saved: tuple[str, ...] = ()
    forward_only: tuple[str, ...] = ("output_final_state",)
    kept: tuple[str, ...] = ()

    _picks: tuple[Any, ...] = field(init=False)
    _absent: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Save every input tensor, and what is kept, unless told; find the arguments' positions."""
        if not self.saved:
            inputs = tuple(name for name in self.of.tensors if name != "cu_seqlens_cpu")
            object.__setattr__(self, "saved", (*inputs, *self.kept))
        given, fields = self.arguments[:-1], self.of.call._fields
        call = tuple(given.index(x) if x in given else len(given) + i for i, x in enumerate(fields))
        defaults = (self.of.call._field_defaults.get(name) for name in fields)
        object.__setattr__(self, "_absent", (*defaults, None))  # the last, at -1, stands for an output's tensor
        outputs = self.of.outputs._fields
        gradients, saved = (
            tuple(given.index(prefix + name) if prefix + name in given else -1 for name in outputs)
            for prefix in ("d", "")
        )
        object.__setattr__(self, "_picks", (call, gradients, saved))

    @property
    def name(self) -> str:
        """The backward operator's name."""
        return f"{self.of.name.removesuffix('_forward')}_backward"

    @property
    def saved_outputs(self) -> tuple[str, ...]:
        """Outputs of the operator that its gradient reads."""
        return tuple(name for name in self.saved if name not in self.of.fields)

    @property
    def received(self) -> tuple[str, ...]:
        """Outputs whose gradients arrive."""
        return tuple(name for name in self.of.outputs._fields if name not in self.kept)

    @property
    def settings(self) -> tuple[str, ...]:
        """Arguments that are no tensors."""
        skipped = (*self.of.tensors, *self.forward_only)
        return tuple(name for name in self.of.fields if name not in skipped)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The backward operator's arguments by name."""
        return (*self.saved, *(f"d{name}" for name in self.received), *self.settings, "output_mask")

    @property
    def results(self) -> tuple[str, ...]:
        """The names of what the backward operator returns."""
        return tuple(f"d{name}" for name in self.need._fields)

    @property
    def schema(self) -> str:
        """The backward operator's schema."""
        kinds = written_types(self.of.outputs) | written_types(self.of.call)
        saved = [f"{SCHEMA_TYPES[kinds[name]]} {name}" for name in self.saved]
        first, *others = self.received
        received = [f"Tensor d{first}", *(f"Tensor? d{name}" for name in others)]
        settings = [f"{SCHEMA_TYPES[kinds[name]]} {name}" for name in self.settings]
        mask = f"bool[{len(self.need._fields)}] output_mask"
        results = ", ".join(f"Tensor? {name}" for name in self.results)
        return f"{self.name}({', '.join((*saved, *received, *settings, mask))}) -> ({results})"

    def parts_of(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """The call, the outputs' gradients and the flags of the backward operator's arguments; the saved outputs, if
        there are any.
        """
        *given, mask = arguments
        given += self._absent
        call, gradients, saved = ([given[i] for i in positions] for positions in self._picks)
        parts = (self.of.call._make(call), self.of.outputs._make(gradients), self.need._make(mask))
        return (*parts, self.of.outputs._make(saved)) if self.saved_outputs else parts


def written_types(fields: type[Any]) -> dict[str, str]:
    """The annotations of a NamedTuple as they are written."""
    return {name: str(getattr(kind, "__forward_arg__", kind)) for name, kind in fields.__annotations__.items()}


def scale_or_default(scale: float | None, q: Tensor) -> float:
    """What queries are multiplied by: K ** -0.5 for q [..., K] where no scale is given."""
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def _default(value: Any) -> str:
    return f'="{value}"' if isinstance(value, str) else f"={value}"
