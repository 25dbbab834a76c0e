"""One comparison: an operator and its peers on one problem, timed in one loop, as rows of results."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .ceilings import Ceilings
from .contenders import COMPILED, EAGER, INLINED, contender, fresh_compiler, inlines, input_sets, ours
from .machine import cache_bytes, version
from .peers import Peer, peers_of
from .problems import FORWARD, Inputs, Problem
from .timing import Contender, measure, peak_memory

OURS = "fla_ops"
LONGEST_PROFILED = 1.0  # seconds: the profile of a peer's longer loop over time fills the memory itself
FOR_SCALE = "another function, for scale"
AGREE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # relative difference from which a peer's result is remarked on
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    device: torch.device
    seconds: float  # that the rounds of one comparison take
    ways: tuple[str, ...] = (EAGER, COMPILED, INLINED)
    peers: bool = True
    half: bool = True  # also in bfloat16, where float32 is the rule
    memory: bool = True


def group(
    problem: Problem, what: str, settings: Settings, ceilings: Ceilings, others: Sequence[Problem] = ()
) -> list[Row]:
    """Rows of one comparison: ours first, then other operators of ours on the same inputs, then the peers."""
    device = settings.device
    sets = input_sets(problem, what, device, cache_bytes(device))
    dtypes = {}
    with fresh_compiler(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine = [
            ours(problem, what, how, sets, f"{OURS} {problem.role if others else how}")
            for how in ways(problem, sets[0], settings)
        ]
        mine += [ours(other, what, EAGER, sets, f"{OURS} {other.role}") for other in others]
        dtypes.update({c.name: problem.dtype for c in mine})
        if settings.half and problem.role == "chunk" and problem.dtype is torch.float32:
            half = input_sets(problem, what, device, cache_bytes(device), torch.bfloat16)
            mine.append(ours(problem, what, EAGER, half, f"{OURS} {EAGER} bfloat16"))
            dtypes[mine[-1].name] = torch.bfloat16
        found = [_peer(peer, problem, what, sets, settings) for peer in _peers(problem, what, settings)]
        theirs = [c for c, _ in found if c is not None]
        other = {c.name for c, note in found if c is not None and note == FOR_SCALE}
        measure([*mine, *theirs], device, settings.seconds)
        if settings.memory:
            for c in (*mine, *(c for c in theirs if c.median < LONGEST_PROFILED)):
                c.peak = peak_memory(c, device)
    rows = [_row(c, problem, what, dtypes[c.name], ceilings, theirs) for c in mine]
    rows += [_row(c, problem, what, problem.dtype, ceilings, []) | {"same": c.name not in other} for c in theirs]
    notes = {c.name: note for c, note in found if c is not None and note}
    for row in rows:
        row["note"] = notes.get(row["who"])
    missing = [{"who": note, "missing": True} for c, note in found if c is None]
    return rows + [{**_name(problem, what), **row} for row in missing]


def ways(problem: Problem, inputs: Inputs, settings: Settings) -> list[str]:
    """Eager, compiled, inlined: as far as asked for and possible."""
    return [how for how in settings.ways if how != INLINED or inlines(problem, inputs, settings.device)]


def _peers(problem: Problem, what: str, settings: Settings) -> list[Peer]:
    return list(peers_of(problem, what, settings.device)) if settings.peers else []


def _peer(
    peer: Peer, problem: Problem, what: str, sets: list[Inputs], settings: Settings
) -> tuple[Contender | None, str]:
    """The peer with its fastest variant and a remark on its result; without a contender, why there is none."""
    candidates = []
    for variant in peer.variants:
        try:
            made = [peer.make(inputs, variant) for inputs in sets]
            name = peer.name if variant is None else f"{peer.name} C={variant}"
            calls = [call for call, _ in made]
            candidate = contender(name, lambda i, calls=calls: calls[i](), [leaves for _, leaves in made], what)
            candidate.call(0)
        except ImportError as error:
            return None, f"{peer.name}: not installed" if version(peer.package) is None else f"{peer.name}: {error}"
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            first = (str(error).splitlines() or [""])[0]
            return None, f"{peer.name}: cannot run here ({type(error).__name__}: {first[:100]})"
        candidates.append(candidate)
    if len(candidates) > 1:
        measure(candidates, settings.device, min(settings.seconds / 2, 1.0))
    best = min(candidates, key=lambda c: min(c.samples, default=0.0))
    best.samples.clear()
    return best, _agreement(peer, problem, what, best, sets)


def _agreement(peer: Peer, problem: Problem, what: str, best: Contender, sets: list[Inputs]) -> str:
    """A remark where the peer computes something else, or does not agree with us."""
    if not peer.same:
        return FOR_SCALE
    if what != FORWARD:
        return ""
    first = best.call(0)
    theirs = first[0] if isinstance(first, tuple) else first
    mine = ours(problem, what, EAGER, sets).call(0)
    mine = mine[0] if isinstance(mine, tuple) else mine
    difference = float((theirs.double() - mine.double()).norm() / mine.double().norm())
    return f"differs by {difference:.0e}" if not difference < AGREE[problem.dtype] else ""


def _name(problem: Problem, what: str) -> Row:
    return {
        "operator": problem.operator,
        "family": problem.family,
        "pass": what,
        "sizes": dict(problem.sizes),
        "strong": problem.strong,
        "dtype": str(problem.dtype).removeprefix("torch."),
    }


def _row(
    c: Contender, problem: Problem, what: str, dtype: torch.dtype, ceilings: Ceilings, peers: list[Contender]
) -> Row:
    work = problem.work(what, dtype)
    floor = work.seconds(ceilings.of(dtype), ceilings.bytes)
    return {
        **_name(problem, what),
        "who": c.name,
        "dtype": str(dtype).removeprefix("torch."),
        "median_ms": c.median * 1e3,
        "best_ms": min(c.samples) * 1e3,
        "spread": c.spread if len(c.samples) > 1 else None,
        "samples": len(c.samples),
        "flops": work.flops,
        "bytes": work.bytes,
        "floor_ms": floor * 1e3,
        "of_floor": floor / c.median,
        "of_product": work.flops / c.median / ceilings.of(dtype),
        "peak_mib": None if c.peak is None else c.peak / 2**20,
        "faster_than": {peer.name: peer.times_slower_than(c) for peer in peers},
    }
