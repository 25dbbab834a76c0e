"""What a piece of time adds to the states of a call, and what it keeps of them, as matrix products.

A family's `Recurrence` says whose product a step adds to a state and which inputs hold the logarithm of what it keeps:

    keep = exp(sum_t g_t),    added = sum_t exp(sum_{s > t} g_s) k_t v_t^T

Sums of decays run from the end that the state leaves by, so they are small where their exponentials are not. Where an
output reads states linearly, the gradient of the state that enters is the same product, of what reads and of that
output's gradient, with sums from the end that the state enters by. How letters meet follows from the axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fla_ops.registrations._vmap import HEADS
from fla_ops.signature import Recurrence
from fla_ops.validation import state_dtype

from .sharding import Sharding


class StatePass(NamedTuple):
    """The steps of a call that this rank has: its arguments, and the axes of each.

    scale    what q is multiplied by
    reverse  whether time runs backwards
    dtype    in which states are carried
    """

    recurrence: Recurrence
    tensors: Mapping[str, Any]
    letters: Mapping[str, list[str]]
    scale: float
    reverse: bool
    dtype: torch.dtype

    @staticmethod
    def of(s: Sharding, arguments: Mapping[str, Any]) -> StatePass:
        """Of the arguments as this rank has them."""
        if s.recurrence is None:
            raise ValueError(f"{s.name} has no recurrence")
        reverse, dtype = bool(arguments.get("reverse")), state_dtype(s.call[0])
        return StatePass(s.recurrence, arguments, s.letters, s.call.factor, reverse, dtype)

    def added(self, state: str, inside: Tensor | None = None) -> Tensor:
        """What the steps that are `inside` [T] (None: all) add to a state, which leaves when they are over."""
        return self._products(state, self.recurrence.adds[state], inside, from_end=not self.reverse, own_step=False)

    def kept(self, state: str, inside: Tensor | None = None) -> Tensor:
        """What these steps keep of a state, broadcast over it."""
        decays, letters = self._decays()
        wanted = ["B" if c == "N" else c for c in self.letters[state]]
        if decays is None:
            return torch.ones([1] * len(wanted), dtype=self.dtype, device=self.device)
        if inside is not None:
            decays = torch.where(_along_time(inside, decays), decays, 0.0)
        return _aligned(decays.sum(1).exp(), [c for c in letters if c != "T"], wanted)

    def read(self, state: str, inside: Tensor | None = None) -> Tensor:
        """The gradient of a state that enters, from these steps of the output that reads it."""
        reader, output = self.recurrence.reads or ("", "")
        shown = self._replace(tensors={**self.tensors, output: self.tensors[f"d{output}"]})
        return self.scale * shown._products(state, (reader, output), inside, from_end=self.reverse, own_step=True)

    def zeros(self, state: str) -> Tensor:
        """A state of each sequence that holds nothing."""
        sizes = [self.size(letter) if letter != "1" else 1 for letter in self.letters[state]]
        return torch.zeros(sizes, dtype=self.dtype, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(x.device for x in self.tensors.values() if isinstance(x, Tensor))

    def _products(
        self, state: str, names: Sequence[str], inside: Tensor | None, from_end: bool, own_step: bool
    ) -> Tensor:
        factors = {name: self.tensors[name].to(self.dtype) for name in names}
        decays, letters = self._decays()
        if decays is not None:
            weighted = next(name for name in names if set(letters) <= set(self.letters[name]))
            weights = _running_sum(decays, from_end, own_step).exp()
            factors[weighted] = factors[weighted] * _aligned(weights, letters, self.letters[weighted])
        if inside is not None:  # each of them: another sequence's NaN times zero is NaN
            factors = {name: torch.where(_along_time(inside, x), x, 0.0) for name, x in factors.items()}
        return self._sum(state, factors)

    def _sum(self, state: str, factors: Mapping[str, Tensor]) -> Tensor:
        """Sum over time of the products of some factors, as a state: grouped heads share those of the fewest."""
        heads = next(c for c in self.letters[state] if c in HEADS)
        count = self.size(heads)
        fewest = min(_heads_of(x, self.letters[name]) for name, x in factors.items())
        terms, operands = [], []
        for name, x in factors.items():
            axis = next(i for i, c in enumerate(self.letters[name]) if c in HEADS)
            operands.append(x.unflatten(axis, (fewest, -1)))
            terms.append(_term(self.letters[name]))
        wanted = [c for c in self.letters[state] if c != "1"]
        result = torch.einsum(f"{','.join(terms)}->{_term(wanted)}", operands)  # [N, fewest, group, widths]
        result = result.expand(-1, -1, count // fewest, *([-1] * (result.dim() - 3))).flatten(1, 2)
        return result.unsqueeze(1) if "1" in self.letters[state] else result

    def _decays(self) -> tuple[Tensor | None, list[str]]:
        """The logarithm of what each step keeps, and its axes."""
        for name in self.recurrence.decays:
            if (x := self.tensors[name]) is not None:
                letters = self.letters[name]
                if "T" in letters:
                    return x.to(self.dtype), letters
                return x.to(self.dtype).expand(1, self.size("T"), *x.shape), ["B", "T", *letters]
        return None, []

    def size(self, letter: str) -> Any:
        """The size of an axis on this rank."""
        if letter == "N":
            offsets = self.tensors.get("cu_seqlens")
            return self.size("B") if offsets is None else offsets.shape[0] - 1
        for name, x in self.tensors.items():
            if isinstance(x, Tensor) and letter in self.letters.get(name, ()):
                return x.shape[self.letters[name].index(letter)]
        raise ValueError(f"no tensor of this call has an axis {letter}")


def _running_sum(decays: Tensor, from_end: bool, own_step: bool) -> Tensor:
    """Sums over time [B, T, ...] from one end to each step; without it unless `own_step`."""
    ordered = decays.flip(1) if from_end else decays
    if not own_step:
        ordered = torch.cat([torch.zeros_like(ordered[:, :1]), ordered], 1)[:, : decays.shape[1]]
    total = ordered.cumsum(1)
    return total.flip(1) if from_end else total


def _aligned(x: Tensor, letters: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """x with an axis of size 1 for each wanted letter that it lacks; both are in one order."""
    for i, letter in enumerate(wanted):
        x = x if letter in letters else x.unsqueeze(i)
    return x


def _along_time(inside: Tensor, x: Tensor) -> Tensor:
    return inside.view(1, -1, *([1] * (x.dim() - 2)))


def _heads_of(x: Tensor, letters: Sequence[str]) -> int:
    return next(n for c, n in zip(letters, x.shape, strict=True) if c in HEADS)


def _term(letters: Sequence[str]) -> str:
    """Letters as einsum has them: a head axis is two, the heads of the fewest and the group that shares one."""
    return "".join("hg" if c in HEADS else {"N": "b"}.get(c, c.lower()) for c in letters)
