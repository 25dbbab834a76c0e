"""Cases of gsa: both forms and the dispatcher run the same scenarios, so that a difference between forms shows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fla_ops.gsa import reference
from tests.cases import COMBINATION, EXPORT, INDUCTOR, SMALL, Case, Draw, Inputs, register, strided, subsets_of
from tests.gsa import serving

DIFFERENTIABLE = ("q", "k", "v", "s", "g", "initial_k", "initial_v")
FORMS = ("chunk_gsa", "fused_recurrent_gsa", "gsa")
OPTIONAL = ("g", "initial_k", "initial_v", "cu_seqlens", "cu_seqlens_cpu")

SIZES = {"B": 2, "T": 37, "HQ": 6, "H": 3, "K": 10, "V": 7, "M": 5}
TINY = {"B": 2, "T": 5, "HQ": 6, "H": 3, "K": 9, "V": 7, "M": 4}
PACK = {"B": 1, "offsets": (0, 0, 1, 20, 20, 37)}  # empty first, one step, empty between, ragged


def inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), wide: bool = True, **arguments: Any
) -> Inputs:
    """q, k, v, s and the optional tensors in `given`; a callable argument changes its tensor, others are passed on."""
    query_heads, heads, key, value, slots = (sizes[letter] for letter in ("HQ", "H", "K", "V", "M"))
    offsets = sizes.get("offsets") if "cu_seqlens" in given else None
    batch, time = (1, offsets[-1]) if offsets else (sizes["B"], sizes["T"])
    sequences = len(offsets) - 1 if offsets else batch
    beside = draw.wide if wide else draw.dtype
    built: Inputs = {
        "q": draw.normal("q", (batch, time, query_heads, key)),
        "k": draw.normal("k", (batch, time, heads, key), std=key**-0.5),
        "v": draw.normal("v", (batch, time, heads, value)),
        "s": draw.normal("s", (batch, time, heads, slots), dtype=beside),
    }
    optional = {
        "g": lambda: draw.decay("g", (batch, time, heads, slots), dtype=beside),
        "initial_k": lambda: draw.normal("initial_k", (sequences, heads, key, slots), dtype=beside),
        "initial_v": lambda: draw.normal("initial_v", (sequences, heads, slots, value), dtype=beside),
        "cu_seqlens": lambda: draw.integers(offsets),
        "cu_seqlens_cpu": lambda: draw.integers(offsets).cpu(),
    }
    built |= {name: optional[name]() for name in OPTIONAL if name in given}
    for name, argument in arguments.items():
        built[name] = argument(built[name]) if callable(argument) else argument
    return built


def reference_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_k: Tensor | None = None,
    initial_v: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    **_: Any,  # cu_seqlens_cpu, chunk_size, checkpoint_level and mode do not change the result
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The recurrence, with the operators' arguments and outputs."""
    o, *states = reference.recurrent(q, k, v, s, g, scale, initial_k, initial_v, reverse, cu_seqlens)
    return o, *(states if output_final_state else (None, None))


def as_pair(inputs: Inputs) -> Inputs:
    """The public functions' arguments: both states in one."""
    inputs = dict(inputs)
    states = inputs.pop("initial_k", None), inputs.pop("initial_v", None)
    return inputs if states[0] is None else inputs | {"initial_state": states}


def case(
    operator: str,
    reason: str,
    given: tuple[str, ...],
    sizes: Mapping[str, Any],
    tags: tuple[str, ...] = (),
    **arguments: Any,
) -> Case:
    """A case of one form; what the form does not take is left out."""
    if operator == "fused_recurrent_gsa":
        arguments = {n: x for n, x in arguments.items() if n not in ("chunk_size", "checkpoint_level")}
    return Case(
        id=reason,
        operator=operator,
        build=partial(inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_recurrent,
        outputs=("o", "final_k", "final_v"),
        differentiable=DIFFERENTIABLE,
        tags=frozenset(tags),
        public=as_pair,
    )


def resets(g: Tensor) -> Tensor:
    """Slots that forget among others that do not: at the first step, in a chunk, at its edge, in a row, in one head."""
    g[:, 0, :, 0] = -1e4
    g[:, 9] = float("-inf")
    g[:, 15, :, 1:3] = -1e4
    g[:, 16, :, 2:4] = float("-inf")
    g[:, 17, :, :3] = -1e4
    g[:, 18, :, 1] = -45.0
    g[:, 25, -1, 4] = float("-inf")
    return g


def register_scenarios(operator: str) -> None:
    """Sizes and decays where implementations go wrong. Chunks have 16 steps, unless the case is about that."""
    states = ("initial_k", "initial_v")
    all_of_it = ("g", *states)
    add = partial(case, operator)
    full = {"output_final_state": True, "chunk_size": 16}
    strided_inputs = dict.fromkeys(("q", "k", "v", "s", "g", *states), strided)
    register(
        add("several-chunks-ragged-tail", all_of_it, SIZES, (INDUCTOR, EXPORT, SMALL), **full, scale=0.3),
        add("no-steps", all_of_it, SIZES | {"T": 0}, **full),
        add("one-step", all_of_it, SIZES | {"T": 1}, (SMALL,), **full),
        add("one-whole-chunk", ("g",), SIZES | {"T": 16}, **full),
        add("strong-decay", all_of_it, SIZES, (SMALL,), **full, g=resets, checkpoint_level=0),
        add("tiny-decays", all_of_it, SIZES, **full, g=lambda g: 35 * g - 5),
        add("a-gate-normaliser-of-a-twentieth", all_of_it, SIZES, **full, g=lambda g: torch.log1p(-g.exp()) / 0.05),
        add("growth", all_of_it, SIZES, **full, g=lambda g: 0.7 * g + 0.3),
        add("slots-without-gates", states, SIZES, (SMALL,), **full),
        add("slots-without-gates-far-apart", (), SIZES, **full, s=lambda s: 30 * s),
        add("packed-with-empty-and-one-step", (*all_of_it, "cu_seqlens"), SIZES | PACK, (INDUCTOR, SMALL), **full),
        add("packed-slots-without-gates", ("cu_seqlens",), SIZES | PACK, **full, checkpoint_level=0),
        add("packed-int32-offsets", ("g", "cu_seqlens", "cu_seqlens_cpu"), SIZES | PACK, **full, cu_seqlens=Tensor.int),
        add("not-contiguous", all_of_it, SIZES, (SMALL,), **full, **strided_inputs),
        add("slots-gates-and-states-in-the-activations-dtype", all_of_it, SIZES, **full, wide=False),
        add("one-head-per-query-head", ("g",), SIZES | {"B": 3, "HQ": 2, "H": 2}, **full),
        add(
            "widths-past-a-tile",
            all_of_it,
            {"B": 1, "T": 18, "HQ": 4, "H": 2, "K": 20, "V": 33, "M": 17},
            (SMALL,),
            **full,
        ),
        add("default-chunk", all_of_it, {"B": 1, "T": 67, "HQ": 4, "H": 2, "K": 3, "V": 5, "M": 6}, checkpoint_level=1),
        add("output-only", all_of_it, SIZES, chunk_size=32, checkpoint_level=0),
    )
    if operator != "chunk_gsa":
        backwards = full | {"reverse": True}
        register(
            add("reverse", all_of_it, SIZES, (SMALL,), **backwards),
            add("reverse-without-gates", (), SIZES, (SMALL,), **backwards),
            add("reverse-packed", (*all_of_it, "cu_seqlens"), SIZES | PACK, **backwards),
            add("reverse-packed-without-gates", ("cu_seqlens",), SIZES | PACK, **backwards),
        )


def register_combinations(operator: str) -> None:
    """Every legal set of optional tensors; the flags take turns."""
    for i, given in enumerate(subsets_of(OPTIONAL, needs={"cu_seqlens_cpu": "cu_seqlens"})):
        flags: dict[str, Any] = {"output_final_state": i % 2 == 0, "checkpoint_level": i % 3}
        if i % 3 == 0:
            flags["scale"] = 0.3
        if operator != "chunk_gsa" and i % 5 == 0:
            flags["reverse"] = True
        if operator == "gsa" and i % 5 in (1, 2):
            flags["mode"] = "chunk"
        sizes = TINY | {"B": 1, "offsets": (0, 2, 2, 3, 5)} if "cu_seqlens" in given else TINY
        register(case(operator, "+".join(given) or "bare", given, sizes, (COMBINATION,), chunk_size=16, **flags))


STEP_SIZES = {"N": 4, "P": 9, "HQ": 6, "H": 3, "K": 5, "V": 7, "M": 8}
SLOTS = (7, -1, 0, 3, 5, 2, 8)  # of the first N sequences; one of them is padding


def step_inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), pool: torch.dtype | None = None, **arguments: Any
) -> Inputs:
    """The arguments of one decode step; the pools are float32 unless told."""
    n, rows, query_heads, heads, key, value, slots = (sizes[x] for x in ("N", "P", "HQ", "H", "K", "V", "M"))
    rows = rows if "slots" in given else n
    turn = -1 if arguments.get("state_v_first") else 1
    built: Inputs = {
        "q": draw.normal("q", (n, query_heads, key)),
        "k": draw.normal("k", (n, heads, key), std=key**-0.5),
        "v": draw.normal("v", (n, heads, value)),
        "s": draw.normal("s", (n, heads, slots), dtype=draw.wide),
        "g": draw.decay("g", (n, heads, slots)),
        "state_k": draw.normal("state_k", (rows, heads, *(key, slots)[::turn]), dtype=pool or draw.wide),
        "state_v": draw.normal("state_v", (rows, heads, *(slots, value)[::turn]), dtype=pool or draw.wide),
    }
    if "slots" in given:
        built["slots"] = draw.integers(SLOTS[:n])
    for name, argument in arguments.items():
        built[name] = argument(built[name]) if callable(argument) else argument
    return built


def reference_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    state_k: Tensor,
    state_v: Tensor,
    scale: float | None = None,
    slots: Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the recurrence for each sequence, and the pools after it."""
    rows = torch.arange(len(q), device=q.device) if slots is None else slots.long()
    o, pools = v.new_zeros(*q.shape[:2], v.shape[2]), (state_k.clone(), state_v.clone())
    used = (rows >= 0).nonzero().squeeze(1)
    step = (x[used, None] for x in (q, k, v, s, g))
    held = [pool[rows[used]] for pool in pools]
    outputs, *states = reference.recurrent(*step, scale, *(x.mT if state_v_first else x for x in held))
    o[used] = outputs[:, 0]
    for pool, state in zip(pools, states, strict=True):
        pool[rows[used]] = (state.mT if state_v_first else state).to(pool.dtype)
    return o, *pools


def step_case(
    reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
) -> Case:
    """A case of the decode step."""
    return Case(
        id=reason,
        operator="gsa_step_",
        build=partial(step_inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_step,
        outputs=("o", "state_k", "state_v"),
        tags=frozenset(tags),
    )


def register_steps() -> None:
    """The decode step: pools, slots, padding."""
    everything = ("q", "k", "v", "s", "g", "state_k", "state_v")
    register(
        step_case("pool-with-padding", ("slots",), STEP_SIZES, (INDUCTOR, EXPORT, SMALL), scale=0.3),
        step_case("bfloat16-pool", ("slots",), STEP_SIZES, pool=torch.bfloat16),
        step_case("float16-pool", ("slots",), STEP_SIZES, (SMALL,), pool=torch.float16),
        step_case("forgets", (), STEP_SIZES, g=lambda g: g.fill_(float("-inf"))),
        step_case("not-contiguous", (), STEP_SIZES, (SMALL,), **dict.fromkeys(everything, strided)),
        step_case("widths-past-a-tile", (), {"N": 2, "P": 2, "HQ": 3, "H": 1, "K": 20, "V": 70, "M": 18}, (SMALL,)),
        step_case("int32-slots", ("slots",), STEP_SIZES, slots=Tensor.int),
        step_case("value-first-bfloat16-pool", ("slots",), STEP_SIZES, state_v_first=True, pool=torch.bfloat16),
        step_case("bare", (), STEP_SIZES, (COMBINATION,)),
        step_case("slots", ("slots",), STEP_SIZES, (COMBINATION,)),
        step_case("value-first", (), STEP_SIZES, (COMBINATION,), state_v_first=True),
        step_case("value-first+slots", ("slots",), STEP_SIZES, (COMBINATION, SMALL), state_v_first=True),
    )


for form in FORMS:
    register_scenarios(form)
    register_combinations(form)
register_steps()
serving.register_prefill()
serving.register_advance()
serving.register_record(as_pair)
