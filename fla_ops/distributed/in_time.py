"""An operator with a recurrence whose time is sharded: an exchange of states, then the operator on each rank's piece.

Both directions sit below autograd. Forward, the state that enters a piece is all that a rank lacks. Backward, the
entering states are found again (a gradient keeps inputs alone), the gradients of the leaving states pass the pieces the
other way, and the backward operator on the piece is exact. Where outputs read states linearly, both travel in one
exchange; otherwise there are two, and the backward operator runs once more, for the gradients of the entering states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate

from .exchange import Passed, Passing, exchange
from .layout import run, wrapped
from .pieces import Piece, row, rows
from .sharding import TIME, Arguments, Sharding
from .state_pass import StatePass

States = dict[str, "Tensor | None"]


def forward(s: Sharding, arguments: Arguments) -> Any:
    """The operator on this rank's piece, from the state that enters it."""
    p = _OnPiece(s, arguments)
    flag = next(name for name in s.forward.fields if name.startswith("output_final"))
    wanted = arguments[flag]
    passed = p.exchange(p.onwards(final=wanted and p.piece is None))
    results = run(s, p.arguments | p.entering(passed) | {flag: wanted and p.piece is not None})
    if not wanted:
        return wrapped(s, results)
    finals = {name: name.replace("initial", "final") for name in p.states}
    for name, final in finals.items():
        results[final] = passed[name].final if p.piece is None else rows(p.piece.ends, results[final])
    return wrapped(s, results, dict.fromkeys(finals.values(), p.once))


def backward(s: Sharding, arguments: Arguments) -> Any:
    """The backward operator on this rank's piece, from the entering state and the gradient of the leaving one."""
    p = _OnPiece(s, arguments)
    onwards = p.onwards(final=False)
    if s.recurrence is not None and s.recurrence.reads is None:
        entering = p.entering(p.exchange(onwards))
        returned = p.exchange(p.back(p.gradients(entering), onwards))
    else:
        back = p.back(p.readings(), onwards)
        passed = p.exchange(onwards | {f"d{name}": x for name, x in back.items()})
        entering, returned = p.entering(passed), {name: passed[f"d{name}"] for name in p.states}
    mask = dict(zip(s.operator.declaration.results, arguments["output_mask"], strict=True))
    own = mask if p.piece else mask | dict.fromkeys((f"d{name}" for name in p.states), False)
    results = run(s, p.arguments | entering | p.leaving(returned) | {"output_mask": list(own.values())})
    gradients = {f"d{name}": x for name, x in returned.items() if mask[f"d{name}"]}
    for name, x in gradients.items():
        if p.piece is not None:
            results[name] = rows(p.piece.starts, results[name])
        elif x.final is not None:
            results[name] = x.final.to(arguments[name[1:]].dtype)
    return wrapped(s, results, dict.fromkeys(gradients, p.once))


class _OnPiece:
    """The piece of a call that this rank has: its arguments, how it cuts packed sequences, what it does to states.

    once  how the ranks hold a state of a whole sequence: all of them, or for a packed one the rank that has its end
    """

    def __init__(self, s: Sharding, arguments: Arguments) -> None:
        self.s, self.dim, self.arguments = s, s.axes.index(TIME), dict(arguments)
        self.steps = StatePass.of(s, arguments)
        self.states, self.reverse = tuple(self.steps.recurrence.adds), self.steps.reverse
        self.piece = self._cut() if s.packed else None
        self.once = Replicate() if self.piece is None else Partial()

    def _cut(self) -> Piece:
        ranks, rank = self.s.mesh.size(self.dim), self.s.mesh.get_local_rank(self.dim)
        time, steps = self.s.sizes["T"], self.steps.size("T")
        low = torch.sym_min(-(-time // ranks) * rank, time)
        piece = Piece.of(self.arguments["cu_seqlens"], low, steps, rank == ranks - 1, self.reverse)
        self.arguments["cu_seqlens"] = piece.offsets
        if self.arguments.get("cu_seqlens_cpu") is not None:
            self.arguments["cu_seqlens_cpu"] = (self.arguments["cu_seqlens_cpu"] - low).clamp(0, steps)
        return piece

    def exchange(self, passing: dict[str, Passing]) -> dict[str, Passed]:
        """Every state, by its name."""
        return dict(zip(passing, exchange(self.s.mesh, self.dim, list(passing.values())), strict=True))

    def onwards(self, final: bool) -> dict[str, Passing]:
        """The states, in the direction of time."""
        passing = {}
        for name in self.states:
            first: Tensor | None = self.arguments[name]
            if self.piece is None:
                passing[name] = Passing(self.steps.added(name), self.steps.kept(name), first, self.reverse, final)
                continue
            added = self._remains(name, first, self.piece.leaving, self.piece.starts & self.piece.leaves)
            kept = torch.where(self.piece.through, self.steps.kept(name), 0.0)
            passing[name] = Passing(self.steps.added(name, self.piece.leaving) + added, kept, None, self.reverse, final)
        return passing

    def _remains(self, name: str, state: Tensor | None, inside: Tensor, marked: Tensor) -> Tensor | float:
        """What is left, after the steps `inside`, of the state of the marked sequence, if it has one."""
        if state is None:
            return 0.0
        return self.steps.kept(name, inside) * row(state.to(self.steps.dtype), marked)

    def back(self, added: dict[str, Tensor], onwards: dict[str, Passing]) -> dict[str, Passing]:
        """The gradients of the states, against the direction of time; a piece keeps as much of them."""
        whole = self.piece is None
        firsts = {name: self._dfinal(name) if whole else None for name in self.states}
        return {
            name: Passing(added[name], onwards[name].keep, firsts[name], not self.reverse, final=whole)
            for name in self.states
        }

    def entering(self, passed: dict[str, Passed]) -> States:
        """The states that the operator starts from on this piece."""
        if self.piece is None:
            return {name: passed[name].entering for name in self.states}
        return {
            name: rows(self.piece.enters, passed[name].entering, rows(self.piece.starts, self.arguments[name]))
            for name in self.states
        }

    def leaving(self, returned: dict[str, Passed]) -> States:
        """The gradients of the states that the operator ends with on this piece, by the backward operator's names."""
        found = {}
        for name in self.states:
            gradient = returned[name].entering
            if self.piece is not None:
                gradient = rows(self.piece.leaves, gradient, rows(self.piece.ends, self._dfinal(name)))
            found[_dfinal_of(name)] = gradient
        return found

    def readings(self) -> dict[str, Tensor]:
        """What the piece adds to the gradient of each state before it, where outputs read states linearly."""
        found = {}
        for name in self.states:
            if self.piece is None:
                found[name] = self.steps.read(name)
                continue
            marked = self.piece.enters & self.piece.ends
            ended = self._remains(name, self._dfinal(name), self.piece.entering, marked)
            found[name] = self.steps.read(name, self.piece.entering) + ended
        return found

    def gradients(self, entering: States) -> dict[str, Tensor]:
        """The same where they do not: the backward operator, for the gradients of the initial states alone."""
        wanted = [name[1:] in self.states for name in self.s.operator.declaration.results]
        zeros = {name: self.steps.zeros(name) for name, x in entering.items() if x is None}
        ends: States = {_dfinal_of(name): None for name in self.states}
        if self.piece is not None:
            ends = {_dfinal_of(name): rows(self.piece.ends, self._dfinal(name)) for name in self.states}
        results = run(self.s, self.arguments | entering | zeros | ends | {"output_mask": wanted})
        found = {name: results[f"d{name}"] for name in self.states}
        wide = {name: x.to(self.steps.dtype) for name, x in found.items() if x is not None}
        return wide if self.piece is None else {name: row(x, self.piece.enters) for name, x in wide.items()}

    def _dfinal(self, name: str) -> Tensor | None:
        gradient: Tensor | None = self.arguments[_dfinal_of(name)]
        return gradient


def _dfinal_of(state: str) -> str:
    """The gradient of the state's end, by the backward operator's name."""
    return state.replace("initial", "dfinal")
