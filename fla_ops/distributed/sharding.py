"""Which axis of a call each mesh dimension shards.

A family declares the axes of every tensor once, in its call.py: "q": "B T HK K". A mesh dimension that shards one
tensor along a letter shards all tensors of the call along the letters of the same axis:

    batch   B, and N where sequences are not packed
    heads   H, HK, HQ; a letter whose size is 1, a head that all share, stays whole
    time    T
    pool    P, the rows of a pool that are addressed by slots

All other letters (widths, offsets) are whole on every rank. A letter that only outputs have, as their first axis,
counts what a rank keeps for its own gradient: it goes along with batch and time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from fla_ops.registrations._op import OPERATORS, Operator
from fla_ops.registrations._vmap import HEADS, axes_of
from fla_ops.signature import Gradient, Recurrence

BATCH, HEAD, TIME, POOL = "batch", "heads", "time", "pool"
VIA_HEADS = "time via heads"  # sharded along time outside, along heads inside: an operator without a recurrence
LETTERS = {BATCH: ("B", "N"), HEAD: HEADS, TIME: ("T",), POOL: ("P",)}

Arguments = dict[str, Any]


class Sharding:
    """The arguments of one call by name, what their axes are, and which axis each mesh dimension shards."""

    def __init__(self, operator: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise ValueError if the call's tensors do not lie on one mesh, or cannot be brought to one axis."""
        declaration = operator.declaration
        self.operator = operator
        self.mutated: tuple[str, ...] = ()
        self.arriving: tuple[str, ...] = ()
        self.name = operator.overload._schema.name
        self.is_backward = isinstance(declaration, Gradient)
        given = dict(zip((a.name for a in operator.overload._schema.arguments), args, strict=False)) | dict(kwargs)
        self.arguments: Arguments = {
            a.name: given.get(a.name, a.default_value) for a in operator.overload._schema.arguments
        }
        values = tuple(self.arguments.values())
        if isinstance(declaration, Gradient):
            self.call, self.forward = declaration.parts_of(values)[0], declaration.of
            self.arriving = tuple(f"d{name}" for name in declaration.received)
        else:
            self.call, self.forward = declaration.call_of(values), declaration
            self.mutated = declaration.mutated
        self.letters = axes_of(self.call.axes)
        self.tensors = {name: x for name, x in self.arguments.items() if isinstance(x, Tensor)}
        self.mesh = self._one_mesh()
        self.packed = getattr(self.call, "cu_seqlens", None) is not None
        self.sizes = {c: n for name, x in self.tensors.items() for c, n in zip(self.of(name), x.shape, strict=False)}
        inputs = {c for name in self.call._fields for c in self.of(name)}
        outputs = [self.of(name) for name in self.call.axes if name not in self.call._fields]
        self.kept_letters = {letters[0] for letters in outputs} - inputs
        self.axes: list[str | None] = []
        for d in range(self.mesh.ndim):
            self.axes.append(self._feasible(self._asked_for(d), d))

    def of(self, name: str) -> list[str]:
        """The letters of a tensor; none for what has no declared axes."""
        return self.letters.get(name, [])

    @property
    def recurrence(self) -> Recurrence | None:
        """What a piece of time does to the states of this operator, if that is known and all else it returns has time
        or is kept for its gradient.
        """
        found: Recurrence | None = getattr(self.call, "recurrence", None)
        if found is None or not set(found.adds) <= set(self.forward.fields):
            return None
        backward = OPERATORS.get(f"{self.forward.name.removesuffix('_forward')}_backward")
        kept = backward.declaration.kept if backward and isinstance(backward.declaration, Gradient) else ()
        finals = {name.replace("initial", "final") for name in found.adds}
        others = set(self.forward.results) - finals - set(kept)
        served = finals <= set(self.forward.results) and all("T" in self.of(name) for name in others)
        return found if served else None

    def sharded(self, d: int) -> set[str]:
        """The letters that mesh dimension d shards while the operator runs."""
        axis = HEAD if self.axes[d] == VIA_HEADS else self.axes[d]
        if axis is None:
            return set()
        letters = {c for c in LETTERS[axis] if axis != HEAD or self.sizes.get(c, 1) != 1}
        return letters | self.kept_letters if axis in (BATCH, TIME) else letters

    def ranks(self, letter: str) -> int:
        """Over how many ranks a letter is spread."""
        found = 1
        for d in range(self.mesh.ndim):
            found *= self.mesh.size(d) if letter in self.sharded(d) else 1
        return found

    def _one_mesh(self) -> Any:
        meshes = list({x.device_mesh: None for x in self.tensors.values() if isinstance(x, DTensor)})
        if len(meshes) != 1:
            raise ValueError(f"{self.name}: the DTensors of a call must be on one mesh, got {meshes}")
        return meshes[0]

    def _asked_for(self, d: int) -> str | None:
        """The axis along which the first tensor is sharded that is; what is updated in place decides if there is any,
        because it does not move.
        """
        for name in self.mutated or (*self.letters, *self.tensors):
            x, letters = self.tensors.get(name), self.of(name)
            if not (isinstance(x, DTensor) and letters):
                continue
            placement = x.placements[d]
            axis = self._axis_of(letters[placement.dim]) if isinstance(placement, Shard) else None
            if axis is not None:
                return axis
            if name in self.mutated and not placement.is_replicate():
                raise ValueError(
                    f"{self.name} updates {name} in place: it may be sharded along heads or along its first axis, got "
                    f"{placement} on mesh dimension {d}"
                )
        return None

    def _axis_of(self, letter: str) -> str | None:
        return next((axis for axis, letters in LETTERS.items() if letter in letters), None)

    def _feasible(self, axis: str | None, d: int) -> str | None:
        """The axis as the operator can run along it; None runs the whole call on every rank of this dimension."""
        if axis == BATCH and self.packed:
            return None
        if axis == HEAD:
            return HEAD if self._heads_divide(d) else None
        if axis != TIME:
            return axis
        if self.recurrence is not None and TIME not in self.axes:
            return TIME
        if self._heads_divide(d):
            return VIA_HEADS
        counts = ", ".join(f"{c} = {self.sizes[c]}" for c in HEADS if c in self.sizes)
        raise ValueError(
            f"{self.name} has no state to exchange along time, so it goes over to heads and back: their numbers must "
            f"be multiples of the ranks, {self._head_ranks(d)}, got {counts}"
        )

    def _heads_divide(self, d: int) -> bool:
        split = [n for c, n in self.sizes.items() if c in HEADS and n != 1]
        return bool(split) and all(n % self._head_ranks(d) == 0 for n in split)

    def _head_ranks(self, d: int) -> int:
        """The ranks that heads would be spread over, mesh dimension d among them."""
        ranks: int = self.mesh.size(d)
        for i, axis in enumerate(self.axes):
            ranks *= self.mesh.size(i) if axis in (HEAD, VIA_HEADS) else 1
        return ranks
