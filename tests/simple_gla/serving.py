"""Cases of simple_gla's operators for servers: prefill into a pool, steps that are taken or not, states on the way."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fla_ops.simple_gla import reference
from tests.cases import COMBINATION, EXPORT, INDUCTOR, SMALL, Case, Draw, Inputs, register, strided, subsets_of

SIZES = {"P": 9, "HK": 3, "H": 6, "K": 10, "V": 7}
BATCH = SIZES | {"B": 3, "T": 37}
PACK = SIZES | {"B": 1, "offsets": (0, 0, 1, 20, 20, 37)}  # empty first, one step, empty between, ragged
TINY = {"P": 7, "HK": 3, "H": 6, "K": 9, "V": 5}
TINY_BATCH = TINY | {"B": 2, "T": 4}
TINY_PACK = TINY | {"B": 1, "offsets": (0, 2, 2, 3, 8)}
SLOTS = (6, 0, -1, 5, 3, 2, 4)  # of the first N sequences; the third is padding
FRESH = (False, True, True, False, True, True, False)


def activations(draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...]) -> tuple[Inputs, int]:
    """q, k, v and those of g, g_gamma and the offsets that are given, and how many sequences there are."""
    heads, key_heads, key, value = (sizes[letter] for letter in ("H", "HK", "K", "V"))
    offsets = sizes.get("offsets") if "cu_seqlens" in given else None
    batch, time = (1, offsets[-1]) if offsets else (sizes["B"], sizes["T"])
    built: Inputs = {
        "q": draw.normal("q", (batch, time, key_heads, key)),
        "k": draw.normal("k", (batch, time, key_heads, key), std=key**-0.5),
        "v": draw.normal("v", (batch, time, heads, value)),
    }
    optional = {
        "g": lambda: draw.decay("g", (batch, time, heads)),
        "g_gamma": lambda: draw.decay("g_gamma", (heads,)),
        "cu_seqlens": lambda: draw.integers(offsets),
        "cu_seqlens_cpu": lambda: draw.integers(offsets).cpu(),
    }
    built |= {name: optional[name]() for name in optional if name in given}
    return built, len(offsets) - 1 if offsets else batch


def pool_of(
    draw: Draw, sizes: Mapping[str, Any], rows: int, dtype: torch.dtype | None, state_v_first: bool = False
) -> Tensor:
    """States of a pool; float32 unless told."""
    widths = (sizes["V"], sizes["K"]) if state_v_first else (sizes["K"], sizes["V"])
    return draw.normal("state", (rows, sizes["H"], *widths), dtype=dtype or draw.wide)


def changed(built: Inputs, arguments: Mapping[str, Any]) -> Inputs:
    """A callable argument changes its tensor, others are passed on."""
    for name, value in arguments.items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def prefill_inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), pool: torch.dtype | None = None, **arguments: Any
) -> Inputs:
    """The arguments of a prefill."""
    built, sequences = activations(draw, sizes, given)
    rows = sizes["P"] if "slots" in given else sequences
    built["state"] = pool_of(draw, sizes, rows, pool, arguments.get("state_v_first", False))
    if "slots" in given:
        built["slots"] = draw.integers(SLOTS[:sequences])
    if "fresh" in given:
        built["fresh"] = torch.tensor(FRESH[:sequences], device=draw.device)
    return changed(built, arguments)


def reference_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    slots: Tensor | None = None,
    fresh: Tensor | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **_: Any,  # cu_seqlens_cpu and chunk_size do not change the result
) -> tuple[Tensor, Tensor]:
    """The recurrence of each sequence from its row, and the pool after it."""
    o, pool = torch.zeros_like(v), state.clone()
    for n, row, steps in sequences_of(q, slots, cu_seqlens):
        initial = torch.zeros_like(state[row : row + 1]) if fresh is not None and fresh[n] else state[row : row + 1]
        part = [None if x is None else x[steps] for x in (q, k, v, g)]
        o[steps], final = reference.recurrent(*part, g_gamma, scale, initial, state_v_first=state_v_first)
        pool[row] = final[0].to(pool.dtype)
    return o, pool


def sequences_of(q: Tensor, slots: Tensor | None, cu_seqlens: Tensor | None) -> list[tuple[int, int, Any]]:
    """The number, the pool's row and the place of each sequence that is no padding."""
    if cu_seqlens is None:
        places: list[Any] = [slice(n, n + 1) for n in range(len(q))]
    else:
        places = [(slice(None), slice(a, b)) for a, b in pairwise(cu_seqlens.tolist())]
    rows = range(len(places)) if slots is None else slots.tolist()
    return [(n, row, place) for n, (row, place) in enumerate(zip(rows, places, strict=True)) if row >= 0]


def prefill_case(
    reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
) -> Case:
    """A case of the prefill. Chunks have 16 steps, unless the case is about that."""
    arguments = {"chunk_size": 16} | arguments
    return Case(
        id=reason,
        operator="simple_gla_prefill_",
        build=partial(prefill_inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_prefill,
        outputs=("o", "state"),
        tags=frozenset(tags),
    )


def register_prefill() -> None:
    """Pools, slots, padding, fresh sequences, layouts."""
    every = ("g", "slots", "fresh")
    packed = (*every, "cu_seqlens")
    wide = {"P": 9, "B": 1, "offsets": (0, 18, 19), "HK": 1, "H": 2, "K": 20, "V": 33}
    register(
        prefill_case("batch-with-padding", every, BATCH, (EXPORT, INDUCTOR, SMALL), scale=0.3),
        prefill_case("packed-with-empty-and-one-step", packed, PACK, (INDUCTOR, SMALL)),
        prefill_case("packed-constant-decay", ("g_gamma", "slots", "cu_seqlens"), PACK),
        prefill_case("packed-int32", (*packed, "cu_seqlens_cpu"), PACK, cu_seqlens=Tensor.int, slots=Tensor.int),
        prefill_case("packed-bfloat16-pool", packed, PACK, pool=torch.bfloat16),
        prefill_case("packed-float16-pool", packed, PACK, (SMALL,), pool=torch.float16),
        prefill_case("packed-value-first", packed, PACK, (SMALL,), state_v_first=True),
        prefill_case("packed-value-first-bfloat16-pool", packed, PACK, state_v_first=True, pool=torch.bfloat16),
        prefill_case("packed-value-first-widths-past-a-tile", packed, wide, state_v_first=True),
        prefill_case("packed-widths-past-a-tile", packed, wide, (SMALL,)),
        prefill_case("not-contiguous", every, BATCH, **dict.fromkeys(("q", "k", "v", "g", "state", "fresh"), strided)),
        prefill_case("no-steps", every, BATCH | {"T": 0}),
        prefill_case("one-step-each", every, BATCH | {"B": 4, "T": 1}),
        prefill_case("default-chunk", ("g", "slots"), BATCH | {"B": 2, "T": 67, "K": 3}, chunk_size=64),
    )
    optional = ("g", "g_gamma", "slots", "fresh", "cu_seqlens", "cu_seqlens_cpu")
    legal = subsets_of(optional, exclusive=[("g", "g_gamma")], needs={"cu_seqlens_cpu": "cu_seqlens"})
    for i, given in enumerate(legal):
        flags: dict[str, Any] = {"state_v_first": True} if i % 2 else {}
        if i % 3 == 0:
            flags["scale"] = 0.3
        sizes = TINY_PACK if "cu_seqlens" in given else TINY_BATCH
        register(prefill_case("+".join(given) or "bare", given, sizes, (COMBINATION,), **flags))


COUNTS = (2, 0, 4, 3, 1, 2, 5)  # of the first N sequences, and never more than there are
DRAFTS = SIZES | {"N": 4, "T": 5}
TINY_DRAFTS = TINY | {"N": 3, "T": 4}


def advance_inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), pool: torch.dtype | None = None, **arguments: Any
) -> Inputs:
    """The arguments of an advance."""
    n, time = sizes["N"], sizes["T"]
    built, _ = activations(draw, {**sizes, "B": n}, given)
    del built["q"]
    rows = sizes["P"] if "slots" in given else n
    built["state"] = pool_of(draw, sizes, rows, pool, arguments.get("state_v_first", False))
    built["accepted"] = draw.integers([min(count, time) for count in COUNTS[:n]])
    if "slots" in given:
        built["slots"] = draw.integers(SLOTS[:n])
    return changed(built, arguments)


def reference_advance(
    k: Tensor,
    v: Tensor,
    state: Tensor,
    accepted: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    slots: Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor]:
    """The pool after the recurrence of each sequence over its accepted steps."""
    pool = state.clone()
    for n, (row, steps) in enumerate(zip(range(len(k)) if slots is None else slots.tolist(), accepted, strict=True)):
        if row >= 0 and steps > 0:
            part = [None if x is None else x[n : n + 1, :steps] for x in (k, k, v, g)]
            _, final = reference.recurrent(*part, g_gamma, None, state[row : row + 1], state_v_first=state_v_first)
            pool[row] = final[0].to(pool.dtype)
    return (pool,)


def advance_case(
    reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
) -> Case:
    """A case of the advance."""
    return Case(
        id=reason,
        operator="simple_gla_advance_",
        build=partial(advance_inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_advance,
        outputs=("state",),
        tags=frozenset(tags),
    )


def register_advance() -> None:
    """Pools, slots, padding, counts, layouts."""
    wide = {"N": 2, "T": 3, "P": 9, "HK": 1, "H": 2, "K": 20, "V": 33}
    register(
        advance_case("pool-with-padding", ("g", "slots"), DRAFTS, (EXPORT, INDUCTOR, SMALL)),
        advance_case("constant-decay", ("g_gamma",), DRAFTS, (SMALL,)),
        advance_case("forgets", ("g",), DRAFTS, g=lambda g: g.fill_(float("-inf"))),
        advance_case("bfloat16-pool", ("g", "slots"), DRAFTS, pool=torch.bfloat16),
        advance_case("float16-pool", ("g", "slots"), DRAFTS, (SMALL,), pool=torch.float16),
        advance_case("value-first-bfloat16-pool", ("g", "slots"), DRAFTS, state_v_first=True, pool=torch.bfloat16),
        advance_case("not-contiguous", ("g",), DRAFTS, **dict.fromkeys(("k", "v", "g", "state", "accepted"), strided)),
        advance_case("widths-past-a-tile", ("g", "slots"), wide, (SMALL,)),
        advance_case("value-first-widths-past-a-tile", ("g", "slots"), wide, (SMALL,), state_v_first=True),
        advance_case("int32", ("slots",), DRAFTS, slots=Tensor.int, accepted=Tensor.int),
    )
    for i, given in enumerate(subsets_of(("g", "g_gamma", "slots"), exclusive=[("g", "g_gamma")])):
        flags: dict[str, Any] = {"state_v_first": True} if i % 2 else {}
        register(advance_case("+".join(given) or "bare", given, TINY_DRAFTS, (COMBINATION,), **flags))


LONG = {"B": 2, "T": 37, "C": 4, "A": 5, "HK": 3, "H": 6, "K": 10, "V": 7}
LONG_PACK = LONG | {"B": 1, "offsets": (0, 0, 1, 33, 33, 85), "C": 5}  # two states, then three
RECORDED = ("q", "initial_state", "cu_seqlens", "cu_seqlens_cpu", "at")
STOPS = (0, 3, 16, 37, -1, 32, 20, 1, 86, 52, 9, 48, 2)  # after so many steps, if the sequence has them


def record_inputs(draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), **arguments: Any) -> Inputs:
    """The arguments of a walk that keeps states."""
    built, sequences = activations(draw, sizes, given)
    if "q" not in given:
        del built["q"]
    if "initial_state" in given:
        built["initial_state"] = pool_of(draw, sizes, sequences, None, arguments.get("state_v_first", False))
    if "at" in given:
        count = sizes["A"]
        built["at"] = draw.integers([STOPS[i % len(STOPS)] for i in range(sequences * count)]).view(sequences, count)
    return changed(built, arguments)


def reference_record(
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    initial_state: Tensor | None = None,
    every: int = 64,
    q: Tensor | None = None,
    scale: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    at: Tensor | None = None,
    **_: Any,  # cu_seqlens_cpu and chunk_size do not change the result
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The recurrence of each sequence, stopped after every few steps and resumed; or stopped where `at` says."""
    batch, time = k.shape[:2]
    if at is not None:
        o, _, final = reference_record(
            k, v, g, g_gamma, initial_state, 64, q, scale, state_v_first=state_v_first, cu_seqlens=cu_seqlens
        )
        states = final.new_zeros(*at.shape, *final.shape[1:])
        for n, _, steps in sequences_of(k, None, cu_seqlens):
            part = [None if x is None else x[steps] for x in (k, k, v, g)]
            state = None if initial_state is None else initial_state[n : n + 1]
            for a, count in enumerate(at[n].tolist()):
                if 0 <= count <= part[1].shape[1]:
                    cut = [None if x is None else x[:, :count] for x in part]
                    states[n, a] = reference.recurrent(*cut, g_gamma, None, state, state_v_first=state_v_first)[1][0]
        return o, states, final
    o, finals, kept = torch.zeros_like(v), [], []
    for n, _, steps in sequences_of(k, None, cu_seqlens):
        part = [None if x is None else x[steps] for x in (k if q is None else q, k, v, g)]
        state = None if initial_state is None else initial_state[n : n + 1]
        length = part[1].shape[1]
        for first in range(0, max(length, 1), every):
            now = [None if x is None else x[:, first : first + every] for x in part]
            outputs, state = reference.recurrent(*now, g_gamma, scale, state, state_v_first=state_v_first)
            o[steps][:, first : first + every] = outputs
            kept += [state] * (first + every <= length)
        finals.append(state)
    missing = batch * (time // every) - len(kept)
    states = torch.cat([*kept, finals[0].new_zeros(missing, *finals[0].shape[1:])])
    return None if q is None else o, states, torch.cat(finals)


def record_case(
    reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
) -> Case:
    """A case of the states. Chunks have 16 steps, and so have the stretches, unless the case is about that."""
    arguments = {"chunk_size": 16, "every": 16} | arguments
    return Case(
        id=reason,
        operator="simple_gla_states",
        build=partial(record_inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_record,
        outputs=("o", "states", "final_state"),
        tags=frozenset(tags),
    )


def register_record() -> None:
    """Lengths, layouts, with and without outputs."""
    full = ("q", "g", "initial_state")
    wide = {"B": 1, "T": 35, "C": 2, "HK": 1, "H": 2, "K": 20, "V": 33}
    strided_inputs = dict.fromkeys(("q", "k", "v", "g", "initial_state"), strided)
    register(
        record_case("ragged-tail", full, LONG, (EXPORT, INDUCTOR, SMALL), scale=0.3),
        record_case("whole-stretches", full, LONG | {"T": 32}),
        record_case("several-chunks-each", full, LONG | {"T": 70}, every=32),
        record_case("no-outputs", ("g", "initial_state"), LONG, (SMALL,)),
        record_case("no-steps", full, LONG | {"T": 0, "C": 0}),
        record_case("fewer-steps-than-one-state", full, LONG | {"T": 15, "C": 0}),
        record_case("packed-with-empty-and-one-step", (*full, "cu_seqlens"), LONG_PACK, (INDUCTOR, SMALL)),
        record_case("packed-int32", ("q", "g_gamma", "cu_seqlens", "cu_seqlens_cpu"), LONG_PACK, cu_seqlens=Tensor.int),
        record_case("packed-value-first", (*full, "cu_seqlens"), LONG_PACK, (SMALL,), state_v_first=True),
        record_case("value-first", full, LONG, state_v_first=True),
        record_case("not-contiguous", full, LONG, **strided_inputs),
        record_case("widths-past-a-tile", full, wide, (SMALL,)),
        record_case("stops", (*full, "at"), LONG, (INDUCTOR, SMALL)),
        record_case("packed-stops", (*full, "cu_seqlens", "at"), LONG_PACK, (INDUCTOR, SMALL), at=Tensor.int),
        record_case("stops-constant-decay-value-first", ("g_gamma", "at"), LONG, state_v_first=True),
        record_case("stops-of-no-steps", (*full, "at"), LONG | {"T": 0, "C": 0}),
        record_case("no-stops", (*full, "at"), LONG | {"A": 0}),
        record_case("default-stretch", ("g",), LONG | {"T": 130}, chunk_size=64, every=64),
    )
    tiny = {"B": 2, "T": 18, "C": 2, "A": 4, "HK": 3, "H": 6, "K": 9, "V": 5}
    optional = ("g", "g_gamma", *RECORDED)
    legal = subsets_of(optional, exclusive=[("g", "g_gamma")], needs={"cu_seqlens_cpu": "cu_seqlens"})
    for i, given in enumerate(legal):
        flags: dict[str, Any] = {"state_v_first": True} if i % 2 else {}
        sizes = tiny | {"B": 1, "offsets": (0, 17, 17, 20), "C": 1} if "cu_seqlens" in given else tiny
        register(record_case("+".join(given) or "bare", given, sizes, (COMBINATION,), **flags))
