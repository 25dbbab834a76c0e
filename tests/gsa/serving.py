"""Cases of gsa's operators for servers: prefill into pools, steps that are taken or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fla_ops.gsa import reference
from tests.cases import COMBINATION, EXPORT, INDUCTOR, SMALL, Case, Draw, Inputs, register, strided, subsets_of

SIZES = {"P": 9, "HQ": 6, "H": 3, "K": 10, "V": 7, "M": 8}
BATCH = SIZES | {"B": 3, "T": 37}
PACK = SIZES | {"B": 1, "offsets": (0, 0, 1, 20, 20, 37)}  # empty first, one step, empty between, ragged
TINY = {"P": 7, "HQ": 6, "H": 3, "K": 9, "V": 5, "M": 4}
TINY_BATCH = TINY | {"B": 2, "T": 4}
TINY_PACK = TINY | {"B": 1, "offsets": (0, 2, 2, 3, 8)}
DRAFTS = SIZES | {"N": 4, "T": 5}
TINY_DRAFTS = TINY | {"N": 3, "T": 4}
SLOTS = (6, 0, -1, 5, 3, 2, 4)  # of the first N sequences; the third is padding
FRESH = (False, True, True, False, True, True, False)
LONG = SIZES | {"B": 2, "T": 37, "C": 4, "A": 5}
LONG_PACK = LONG | {"B": 1, "offsets": (0, 0, 1, 33, 33, 85), "C": 5}  # two states, then three
TINY_LONG = TINY | {"B": 2, "T": 18, "C": 2, "A": 6}
TINY_LONG_PACK = TINY_LONG | {"B": 1, "offsets": (0, 17, 17, 20), "C": 1, "A": 2}
STOPS = (0, 3, 16, 37, -1, 32, 20, 1, 86, 52, 9, 48, 2)  # after so many steps, if the sequence has them
COUNTS = (2, 0, 4, 3, 1, 2, 5)  # of the first N sequences, and never more than there are


def activations(draw: Draw, sizes: Mapping[str, Any], lead: tuple[int, int]) -> Inputs:
    """q, k, v, s and g of [B, T]."""
    query_heads, heads, key, value, slots = (sizes[letter] for letter in ("HQ", "H", "K", "V", "M"))
    return {
        "q": draw.normal("q", (*lead, query_heads, key)),
        "k": draw.normal("k", (*lead, heads, key), std=key**-0.5),
        "v": draw.normal("v", (*lead, heads, value)),
        "s": draw.normal("s", (*lead, heads, slots), dtype=draw.wide),
        "g": draw.decay("g", (*lead, heads, slots)),
    }


def pools_of(
    draw: Draw, sizes: Mapping[str, Any], rows: int, dtype: torch.dtype | None, state_v_first: bool = False
) -> Inputs:
    """Both pools; float32 unless told."""
    key, value, slots = (sizes[letter] for letter in ("K", "V", "M"))
    turn = -1 if state_v_first else 1
    shapes = {"state_k": (key, slots)[::turn], "state_v": (slots, value)[::turn]}
    return {n: draw.normal(n, (rows, sizes["H"], *x), dtype=dtype or draw.wide) for n, x in shapes.items()}


def changed(built: Inputs, arguments: Mapping[str, Any]) -> Inputs:
    """A callable argument changes its tensor, others are passed on."""
    for name, value in arguments.items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def prefill_inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), pool: torch.dtype | None = None, **arguments: Any
) -> Inputs:
    """The arguments of a prefill."""
    offsets = sizes.get("offsets") if "cu_seqlens" in given else None
    sequences = len(offsets) - 1 if offsets else sizes["B"]
    built = activations(draw, sizes, (1, offsets[-1]) if offsets else (sizes["B"], sizes["T"]))
    rows = sizes["P"] if "slots" in given else sequences
    built |= pools_of(draw, sizes, rows, pool, arguments.get("state_v_first", False))
    optional = {
        "slots": lambda: draw.integers(SLOTS[:sequences]),
        "fresh": lambda: torch.tensor(FRESH[:sequences], device=draw.device),
        "cu_seqlens": lambda: draw.integers(offsets),
        "cu_seqlens_cpu": lambda: draw.integers(offsets).cpu(),
    }
    return changed(built | {name: optional[name]() for name in optional if name in given}, arguments)


def advanced(part: list[Any], scale: float | None, states: list[Tensor], state_v_first: bool) -> list[Tensor]:
    """The recurrence over one sequence: o, then both states as the pools hold them."""
    o, *final = reference.recurrent(*part, scale, *(x.mT if state_v_first else x for x in states))
    return [o, *(x.mT if state_v_first else x for x in final)]


def reference_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    state_k: Tensor,
    state_v: Tensor,
    scale: float | None = None,
    slots: Tensor | None = None,
    fresh: Tensor | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **_: Any,  # cu_seqlens_cpu and chunk_size do not change the result
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of each sequence from its rows, and the pools after it."""
    o, pools = v.new_zeros(*q.shape[:3], v.shape[3]), (state_k.clone(), state_v.clone())
    places: list[Any] = [slice(n, n + 1) for n in range(len(q))]
    if cu_seqlens is not None:
        places = [(slice(None), slice(a, b)) for a, b in pairwise(cu_seqlens.tolist())]
    for n, (row, steps) in enumerate(zip(range(len(places)) if slots is None else slots.tolist(), places, strict=True)):
        if row >= 0:
            states = [pool[row : row + 1] for pool in (state_k, state_v)]
            states = [torch.zeros_like(x) for x in states] if fresh is not None and fresh[n] else states
            o[steps], *final = advanced([x[steps] for x in (q, k, v, s, g)], scale, states, state_v_first)
            for pool, state in zip(pools, final, strict=True):
                pool[row] = state[0].to(pool.dtype)
    return o, *pools


def advance_inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), pool: torch.dtype | None = None, **arguments: Any
) -> Inputs:
    """The arguments of an advance."""
    n, time = sizes["N"], sizes["T"]
    built = activations(draw, sizes, (n, time))
    del built["q"]
    rows = sizes["P"] if "slots" in given else n
    built |= pools_of(draw, sizes, rows, pool, arguments.get("state_v_first", False))
    built["accepted"] = draw.integers([min(count, time) for count in COUNTS[:n]])
    if "slots" in given:
        built["slots"] = draw.integers(SLOTS[:n])
    return changed(built, arguments)


def reference_advance(
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    state_k: Tensor,
    state_v: Tensor,
    accepted: Tensor,
    slots: Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """The pools after the recurrence of each sequence over its accepted steps."""
    pools = state_k.clone(), state_v.clone()
    for n, (row, steps) in enumerate(zip(range(len(k)) if slots is None else slots.tolist(), accepted, strict=True)):
        if row >= 0 and steps > 0:
            part = [x[n : n + 1, :steps] for x in (k, k, v, s, g)]
            _, *final = advanced(part, None, [x[row : row + 1] for x in (state_k, state_v)], state_v_first)
            for pool, state in zip(pools, final, strict=True):
                pool[row] = state[0].to(pool.dtype)
    return pools


def case(
    operator: str,
    reason: str,
    given: tuple[str, ...],
    sizes: Mapping[str, Any],
    tags: tuple[str, ...] = (),
    **arguments: Any,
) -> Case:
    """A case of the prefill, whose chunks have 16 steps, or of the advance."""
    prefill = operator == "gsa_prefill_"
    arguments = {"chunk_size": 16} | arguments if prefill else arguments
    return Case(
        id=reason,
        operator=operator,
        build=partial(prefill_inputs if prefill else advance_inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_prefill if prefill else reference_advance,
        outputs=(*["o"] * prefill, "state_k", "state_v"),
        tags=frozenset(tags),
    )


def register_prefill() -> None:
    """Pools, slots, padding, fresh sequences, layouts."""
    add = partial(case, "gsa_prefill_")
    packed = ("slots", "fresh", "cu_seqlens")
    tensors = ("q", "k", "v", "s", "g", "state_k", "state_v", "fresh")
    register(
        add("batch-with-padding", ("slots", "fresh"), BATCH, (EXPORT, INDUCTOR, SMALL), scale=0.3),
        add("packed-with-empty-and-one-step", packed, PACK, (INDUCTOR, SMALL)),
        add("packed-int32", (*packed, "cu_seqlens_cpu"), PACK, cu_seqlens=Tensor.int, slots=Tensor.int),
        add("packed-bfloat16-pools", packed, PACK, pool=torch.bfloat16),
        add("packed-value-first", packed, PACK, state_v_first=True),
        add("not-contiguous", ("slots", "fresh"), BATCH, **dict.fromkeys(tensors, strided)),
        add("no-steps", ("slots", "fresh"), BATCH | {"T": 0}),
        add("default-chunk", ("slots",), BATCH | {"B": 2, "T": 67, "K": 3}, chunk_size=64),
        add("one-step-each", ("slots", "fresh"), BATCH | {"B": 4, "T": 1}),
    )
    optional = ("slots", "fresh", "cu_seqlens", "cu_seqlens_cpu")
    for i, given in enumerate(subsets_of(optional, needs={"cu_seqlens_cpu": "cu_seqlens"})):
        flags: dict[str, Any] = {"state_v_first": True} if i % 2 else {}
        sizes = TINY_PACK if "cu_seqlens" in given else TINY_BATCH
        register(add("+".join(given) or "bare", given, sizes, (COMBINATION,), **flags))


def register_advance() -> None:
    """Pools, slots, padding, counts, layouts."""
    add = partial(case, "gsa_advance_")
    tensors = ("k", "v", "s", "g", "state_k", "state_v", "accepted")
    register(
        add("pools-with-padding", ("slots",), DRAFTS, (EXPORT, INDUCTOR, SMALL)),
        add("forgets", (), DRAFTS, g=lambda g: g.fill_(float("-inf"))),
        add("bfloat16-pools", ("slots",), DRAFTS, pool=torch.bfloat16),
        add("float16-pools", ("slots",), DRAFTS, pool=torch.float16),
        add("not-contiguous", (), DRAFTS, **dict.fromkeys(tensors, strided)),
        add("int32", ("slots",), DRAFTS, slots=Tensor.int, accepted=Tensor.int),
        add("bare", (), TINY_DRAFTS, (COMBINATION,)),
        add("slots", ("slots",), TINY_DRAFTS, (COMBINATION,)),
        add("value-first", (), TINY_DRAFTS, (COMBINATION,), state_v_first=True),
        add("value-first+slots", ("slots",), TINY_DRAFTS, (COMBINATION,), state_v_first=True),
    )


def record_inputs(draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), **arguments: Any) -> Inputs:
    """The arguments of a walk that keeps states."""
    offsets = sizes.get("offsets") if "cu_seqlens" in given else None
    sequences = len(offsets) - 1 if offsets else sizes["B"]
    built = activations(draw, sizes, (1, offsets[-1]) if offsets else (sizes["B"], sizes["T"]))
    states = pools_of(draw, sizes, sequences, None)
    stops = [STOPS[i % len(STOPS)] for i in range(sequences * sizes["A"])]
    optional = {
        "q": lambda: built["q"],
        "initial_k": lambda: states["state_k"],
        "initial_v": lambda: states["state_v"],
        "cu_seqlens": lambda: draw.integers(offsets),
        "cu_seqlens_cpu": lambda: draw.integers(offsets).cpu(),
        "at": lambda: draw.integers(stops).view(sequences, sizes["A"]),
    }
    kept = {name: x for name, x in built.items() if name != "q"}
    return changed(kept | {name: optional[name]() for name in optional if name in given}, arguments)


def reference_record(
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    initial_k: Tensor | None = None,
    initial_v: Tensor | None = None,
    every: int = 64,
    q: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    at: Tensor | None = None,
    **_: Any,  # cu_seqlens_cpu and chunk_size do not change the result
) -> tuple[Tensor | None, ...]:
    """The recurrence of each sequence from its start to each stop."""
    x, states = (k if q is None else q, k, v, s, g), (initial_k, initial_v)
    places: list[Any] = [(slice(n, n + 1), slice(None)) for n in range(len(k))]
    if cu_seqlens is not None:
        places = [(slice(None), slice(a, b)) for a, b in pairwise(cu_seqlens.tolist())]
    kept = []
    for n, place in enumerate(places):
        part = [y[place] for y in x]
        length = part[0].shape[1]
        stops = range(every, length + 1, every) if at is None else at[n].tolist()
        initial = [None if y is None else y[n : n + 1] for y in states]
        for stop in stops:
            _, *found = reference.recurrent(*(y[:, :stop] for y in part), scale, *initial)
            kept.append(found if 0 <= stop <= length else [torch.zeros_like(y) for y in found])
    o, *final = reference.recurrent(*x, scale, *states, False, cu_seqlens)
    rows = k.shape[0] * (k.shape[1] // every) if at is None else at.numel()
    found = [y.new_zeros(rows, *y.shape[1:]) for y in final]
    for row, pair in enumerate(kept):
        for y, state in zip(found, pair, strict=True):
            y[row] = state[0]
    if at is not None:
        found = [y.unflatten(0, at.shape) for y in found]
    return None if q is None else o, *found, *final


def register_record(as_pair: Callable[[Inputs], Inputs]) -> None:
    """Lengths, stops, with and without outputs."""

    def add(
        reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
    ) -> Case:
        return Case(
            id=reason,
            operator="gsa_states",
            build=partial(record_inputs, given=given, **{"chunk_size": 16, "every": 16} | arguments),
            sizes=sizes,
            reference=reference_record,
            outputs=("o", "states_k", "states_v", "final_k", "final_v"),
            tags=frozenset(tags),
            public=as_pair,
        )

    states = ("initial_k", "initial_v")
    full = ("q", *states)
    tensors = ("q", "k", "v", "s", "g", *states)
    register(
        add("ragged-tail", full, LONG, (EXPORT, INDUCTOR, SMALL), scale=0.3),
        add("several-chunks-each", full, LONG | {"T": 70}, every=32),
        add("no-outputs", states, LONG),
        add("no-steps", full, LONG | {"T": 0, "C": 0}),
        add("fewer-steps-than-one-state", full, LONG | {"T": 15, "C": 0}),
        add("packed-with-empty-and-one-step", (*full, "cu_seqlens"), LONG_PACK, (INDUCTOR, SMALL)),
        add("packed-int32", ("q", "cu_seqlens", "cu_seqlens_cpu"), LONG_PACK, cu_seqlens=Tensor.int),
        add("not-contiguous", full, LONG, **dict.fromkeys(tensors, strided)),
        add("stops", (*full, "at"), LONG, (INDUCTOR,)),
        add("packed-stops", (*full, "cu_seqlens", "at"), LONG_PACK, (INDUCTOR,), at=Tensor.int),
        add("stops-of-no-steps", (*full, "at"), LONG | {"T": 0, "C": 0}),
        add("chunks-of-64-in-halves", (*full, "at"), LONG | {"T": 130}, chunk_size=64, every=64),
    )
    optional = ("q", *states, "cu_seqlens", "cu_seqlens_cpu", "at")
    needs = {"cu_seqlens_cpu": "cu_seqlens", "initial_k": "initial_v", "initial_v": "initial_k"}
    for given in subsets_of(optional, needs=needs):
        sizes = TINY_LONG_PACK if "cu_seqlens" in given else TINY_LONG
        register(add("+".join(given) or "bare", given, sizes, (COMBINATION,)))
