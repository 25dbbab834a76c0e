"""The exchange of states between the ranks of a mesh dimension that hold successive pieces of time.

A piece turns the state that enters it into `keep * state + added`. From `added` and `keep` of all pieces each rank
finds the state that enters its own. All of it is products and sums, no quotient, so that a piece may forget everything.

    gathered    one all-gather: every rank gets all states, (ranks - 1) times the size of one
    transposed  an all-to-all, a scan, an all-to-all: a rank gets 1/ranks of every state and sends back what enters each
                piece, twice the size of one whatever the number of ranks

The scan sits below autograd: the gradient of a state passes the pieces the other way, by the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

GATHERED_UP_TO = 64  # ranks: about where an all-gather of the states takes longer than two all-to-alls


class Passing(NamedTuple):
    """One state on its way through the pieces.

    added      what this rank's piece adds to it
    keep       what the piece keeps of it, broadcast over `added`
    first      the state before all pieces; None stands for zeros
    backwards  through the pieces from the last rank to the first
    final      whether the state after all pieces is wanted
    """

    added: Tensor
    keep: Tensor
    first: Tensor | None
    backwards: bool
    final: bool


class Passed(NamedTuple):
    """The state that enters this rank's piece (None for zeros), and if wanted the one after all pieces."""

    entering: Tensor | None
    final: Tensor | None


def exchange(mesh: Any, dim: int, states: Sequence[Passing]) -> list[Passed]:
    """Pass every state through the pieces; on the wire they travel together."""
    return gathered(mesh, dim, states) if mesh.size(dim) <= GATHERED_UP_TO else transposed(mesh, dim, states)


def gathered(mesh: Any, dim: int, states: Sequence[Passing]) -> list[Passed]:
    """One all-gather, whatever the number of states."""
    sent = list({id(x): x for s in states for x in (s.added, s.keep)}.values())  # two states may share what is kept
    flat = torch.cat([x.reshape(-1) for x in sent])
    parts = _all_gather(mesh, dim, flat).split([x.numel() for x in sent], 1)
    whole = {id(x): part.reshape(-1, *x.shape) for x, part in zip(sent, parts, strict=True)}
    rank, ranks = mesh.get_local_rank(dim), mesh.size(dim)
    passed = []
    for s in states:
        added, keep = whole[id(s.added)], whole[id(s.keep)]
        if s.backwards:
            added, keep = added.flip(0), keep.flip(0)
        before = ranks - 1 - rank if s.backwards else rank
        final = _after(added, keep, s.first) if s.final else None
        passed.append(Passed(_after(added[:before], keep[:before], s.first), final))
    return passed


def transposed(mesh: Any, dim: int, states: Sequence[Passing]) -> list[Passed]:
    """Two all-to-alls, and all-gathers of what is kept and, if wanted, of the final states, which are small beside."""
    ranks = mesh.size(dim)
    rows = [_Rows.of(s, ranks) for s in states]
    widths = [r.share.shape[1] * r.share.shape[2] for r in rows]
    sent = torch.cat([r.share.reshape(ranks, -1) for r in rows], 1)
    shares = _all_to_all(mesh, dim, sent).split(widths, 1)
    keeps = _all_gather(mesh, dim, torch.cat([r.keep for r in rows])).split([r.keep.numel() for r in rows], 1)
    entering, final = [], []
    for s, r, share, keep in zip(states, rows, shares, keeps, strict=True):
        pieces, kept = share.reshape(ranks, -1, r.keep.numel()), keep[:, None]
        if s.backwards:
            pieces, kept = pieces.flip(0), kept.flip(0)
        after = _scan(pieces, kept, None if s.first is None else r.mine(s.first, mesh.get_local_rank(dim)))
        before, last = after[:-1], after[-1:]
        entering.append((before.flip(0) if s.backwards else before).reshape(ranks, -1))
        final.append(last.reshape(1, -1))
    returned = _all_to_all(mesh, dim, torch.cat(entering, 1)).split(widths, 1)
    passed = []
    for s, r, mine, last in zip(states, rows, returned, final, strict=True):
        end = r.whole(_all_gather(mesh, dim, last[0])) if s.final else None
        passed.append(Passed(r.whole(mine), end))
    return passed


class _Rows(NamedTuple):
    """A state as rows [ranks, rows of a rank, entries that are kept apart]: what is kept is one vector for all rows."""

    share: Tensor
    keep: Tensor
    order: tuple[int, ...]
    sizes: tuple[Any, ...]

    @staticmethod
    def of(s: Passing, ranks: int) -> _Rows:
        alike = [i for i, n in enumerate(s.keep.shape) if n == 1]
        order = (*alike, *(i for i in range(s.added.dim()) if i not in alike))
        sizes = tuple(s.added.shape[i] for i in order)
        return _Rows(_Rows.split(s.added, order, s.keep.numel(), ranks), s.keep.reshape(-1), order, sizes)

    @staticmethod
    def split(x: Tensor, order: tuple[int, ...], width: int, ranks: int) -> Tensor:
        rows = x.permute(order).reshape(-1, width)
        return F.pad(rows, (0, 0, 0, -len(rows) % ranks)).reshape(ranks, -1, width)

    def mine(self, x: Tensor, rank: int) -> Tensor:
        """The rows of one rank, of a state that every rank has."""
        return self.split(x.to(self.share.dtype), self.order, self.keep.numel(), len(self.share))[rank]

    def whole(self, shares: Tensor) -> Tensor:
        """A state from its rows [ranks, ...]."""
        count = 1
        for n in self.sizes:
            count *= n
        ordered = shares.reshape(-1)[:count].reshape(self.sizes)
        return ordered.permute([self.order.index(i) for i in range(len(self.order))])


def _after(added: Tensor, keep: Tensor, first: Tensor | None) -> Tensor | None:
    """The state after some pieces [pieces, ...], from the first state."""
    if len(added) == 0:
        return None if first is None else first.to(added.dtype)
    onwards = keep.flip(0).cumprod(0).flip(0)  # what is kept from a piece's start to the end
    later = torch.cat([onwards[1:], torch.ones_like(onwards[:1])])
    state = _product(later, added).sum(0)
    return state if first is None else state + _product(onwards[0], first.to(added.dtype))


def _scan(added: Tensor, keep: Tensor, first: Tensor | None) -> Tensor:
    """The states before the first piece and after each, in a number of passes that is the logarithm of the ranks."""
    start = torch.zeros_like(added[:1]) if first is None else first[None]
    state, kept = torch.cat([start, added]), torch.cat([torch.zeros_like(keep[:1]), keep])
    reach = 1
    while reach < len(state):
        state = torch.cat([state[:reach], state[reach:] + _product(kept[reach:], state[:-reach])])
        kept = torch.cat([kept[:reach], kept[reach:] * kept[:-reach]])
        reach *= 2
    return state


def _product(keep: Tensor, state: Tensor) -> Tensor:
    """keep * state, where what is forgotten may be NaN: it belongs to another sequence."""
    return torch.where(keep == 0, 0.0, keep * state)


def _all_gather(mesh: Any, dim: int, x: Tensor) -> Tensor:
    """x of every rank, [ranks, *x.shape]."""
    return _redistribute(mesh, dim, x[None], Shard(0), Replicate())


def _all_to_all(mesh: Any, dim: int, x: Tensor) -> Tensor:
    """From x [ranks, ...] of every rank what it holds for this one."""
    return _redistribute(mesh, dim, x[None], Shard(0), Shard(1))[:, 0]


def _redistribute(mesh: Any, dim: int, x: Tensor, source: Any, target: Any) -> Tensor:
    """DTensor's own collectives, which trace. Ranks along other mesh dimensions do not meet here."""
    before, after = [Replicate()] * mesh.ndim, [Replicate()] * mesh.ndim
    before[dim], after[dim] = source, target
    local: Tensor = DTensor.from_local(x, mesh, before, run_check=False).redistribute(mesh, after).to_local()
    return local
