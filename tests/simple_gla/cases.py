"""Cases of simple_gla: every form runs the same scenarios, so that a difference between forms shows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fla_ops.simple_gla import reference
from tests.cases import COMBINATION, EXPORT, INDUCTOR, SMALL, Case, Draw, Inputs, register, strided, subsets_of
from tests.simple_gla import serving

DIFFERENTIABLE = ("q", "k", "v", "g", "g_gamma", "initial_state")
FORMS = (
    "chunk_simple_gla",
    "fused_chunk_simple_gla",
    "fused_recurrent_simple_gla",
    "parallel_simple_gla",
    "simple_gla",
)
OPTIONAL = ("g", "g_gamma", "initial_state", "cu_seqlens", "cu_seqlens_cpu")

SIZES = {"B": 2, "T": 37, "HK": 3, "H": 6, "K": 10, "V": 7}
TINY = {"B": 2, "T": 5, "HK": 3, "H": 6, "K": 9, "V": 7}
PACK = {"B": 1, "offsets": (0, 0, 1, 20, 20, 37)}  # empty first, one step, empty between, ragged


def inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), wide: bool = True, **arguments: Any
) -> Inputs:
    """q, k, v and the optional tensors in `given`; a callable argument changes its tensor, others are passed on."""
    heads, key_heads, key, value = (sizes[letter] for letter in ("H", "HK", "K", "V"))
    offsets = sizes.get("offsets") if "cu_seqlens" in given else None
    batch, time = (1, offsets[-1]) if offsets else (sizes["B"], sizes["T"])
    sequences = len(offsets) - 1 if offsets else batch
    widths = (value, key) if arguments.get("state_v_first") else (key, value)
    built: Inputs = {
        "q": draw.normal("q", (batch, time, key_heads, key)),
        "k": draw.normal("k", (batch, time, key_heads, key), std=key**-0.5),
        "v": draw.normal("v", (batch, time, heads, value)),
    }
    beside = draw.wide if wide else draw.dtype
    optional = {
        "g": lambda: draw.decay("g", (batch, time, heads), dtype=beside),
        "g_gamma": lambda: draw.decay("g_gamma", (heads,), dtype=beside),
        "initial_state": lambda: draw.normal("initial_state", (sequences, heads, *widths), dtype=beside),
        "cu_seqlens": lambda: draw.integers(offsets),
        "cu_seqlens_cpu": lambda: draw.integers(offsets).cpu(),
    }
    built |= {name: optional[name]() for name in OPTIONAL if name in given}
    for name, value in arguments.items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def reference_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    **_: Any,  # cu_seqlens_cpu, chunk_size and mode do not change the result
) -> tuple[Tensor, Tensor | None]:
    """The recurrence, with the operators' arguments and outputs."""
    o, state = reference.recurrent(q, k, v, g, g_gamma, scale, initial_state, reverse, state_v_first, cu_seqlens)
    return o, state if output_final_state else None


def reference_parallel(output_attentions: bool = False, **inputs: Any) -> tuple[Any, ...]:
    """The quadratic form, with the operator's arguments and outputs."""
    inputs.pop("cu_seqlens_cpu", None)
    o, attn = reference.parallel(**inputs)
    return o, attn if output_attentions else None


def case(
    operator: str,
    reason: str,
    given: tuple[str, ...],
    sizes: Mapping[str, Any],
    tags: tuple[str, ...] = (),
    **arguments: Any,
) -> Case:
    """A case of one form; what the form does not take is left out."""
    if operator == "parallel_simple_gla":
        given = tuple(name for name in given if name != "initial_state")
        arguments["output_attentions"] = arguments.pop("output_final_state", False)
        arguments = {name: value for name, value in arguments.items() if name not in ("state_v_first", "initial_state")}
    if operator in ("parallel_simple_gla", "fused_recurrent_simple_gla"):
        arguments.pop("chunk_size", None)
    parallel = operator == "parallel_simple_gla"
    return Case(
        id=reason,
        operator=operator,
        build=partial(inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_parallel if parallel else reference_recurrent,
        outputs=("o", "attn" if parallel else "final_state"),
        differentiable=DIFFERENTIABLE,
        tags=frozenset(tags),
    )


def resets(g: Tensor) -> Tensor:
    """Strong decays among ordinary ones: at the first step, in a chunk, at its edge, two in a row, in one head only."""
    for step, value in ((0, -1e4), (9, float("-inf")), (15, -1e4), (16, float("-inf")), (17, -1e4), (18, -45.0)):
        g[:, step] = value
    g[:, 25, 2] = float("-inf")
    return g


def tiny(g: Tensor) -> Tensor:
    """Decays down to e-40 in every other head, whose products are denormal; each is above or below what counts as zero.

    Only in every other: the gradient of such a gate is far below the rounding of the terms whose difference it is.
    """
    g[..., ::2] = 35 * g[..., ::2] - 5
    return g


def strong_heads(g_gamma: Tensor) -> Tensor:
    """Heads that forget at every step, beside ordinary ones."""
    g_gamma[1], g_gamma[2], g_gamma[4] = float("-inf"), -1e4, -45.0
    return g_gamma


def register_scenarios(operator: str) -> None:
    """Sizes and decays where implementations go wrong. Chunks have 16 steps, unless the case is about that."""
    all_of_it = ("g", "initial_state")
    add = partial(case, operator)
    full = {"output_final_state": True, "chunk_size": 16}
    strided_inputs = dict.fromkeys(("q", "k", "v", "g", "initial_state"), strided)
    register(
        add("several-chunks-ragged-tail", all_of_it, SIZES, (INDUCTOR, EXPORT, SMALL), **full, scale=0.3),
        add("no-steps", all_of_it, SIZES | {"T": 0}, **full),
        add("one-step", all_of_it, SIZES | {"T": 1}, (SMALL,), **full),
        add("one-whole-chunk", ("g",), SIZES | {"T": 16}, **full),
        add("no-decay", ("initial_state",), SIZES | {"T": 19}, **full),
        add("constant-decay", ("g_gamma", "initial_state"), SIZES, (SMALL,), **full),
        add("constant-decay-strong", ("g_gamma", "initial_state"), SIZES, **full, g_gamma=strong_heads),
        add("strong-decay", all_of_it, SIZES, (SMALL,), **full, g=resets),
        add("tiny-decays", all_of_it, SIZES, **full, g=tiny),
        add("growth", all_of_it, SIZES, **full, g=lambda g: 0.7 * g + 0.3),
        add(
            "packed-with-empty-and-one-step",
            ("g", "initial_state", "cu_seqlens"),
            SIZES | PACK,
            (INDUCTOR, SMALL),
            **full,
        ),
        add("packed-constant-decay", ("g_gamma", "cu_seqlens"), SIZES | PACK, **full),
        add(
            "packed-int32-offsets",
            ("cu_seqlens", "cu_seqlens_cpu"),
            SIZES | PACK,
            **full,
            cu_seqlens=Tensor.int,
        ),
        add("not-contiguous", all_of_it, SIZES, (SMALL,), **full, **strided_inputs),
        add("gates-and-state-in-the-activations-dtype", all_of_it, SIZES, **full, wide=False),
        add("one-head-per-value-head", ("g",), SIZES | {"B": 3, "HK": 2, "H": 2}, **full),
        add("widths-past-a-tile", all_of_it, {"B": 1, "T": 18, "HK": 2, "H": 4, "K": 20, "V": 33}, (SMALL,), **full),
        add("default-chunk", all_of_it, {"B": 1, "T": 67, "HK": 2, "H": 4, "K": 3, "V": 5}, output_final_state=True),
    )
    if operator != "parallel_simple_gla":
        register(
            add("state-value-first", all_of_it, SIZES, (SMALL,), **full, state_v_first=True),
            add("output-only", ("g", "initial_state"), SIZES, chunk_size=32),
        )
        register(
            add("reverse", all_of_it, SIZES, (SMALL,), **full, reverse=True),
            add("reverse-packed", ("g", "initial_state", "cu_seqlens"), SIZES | PACK, **full, reverse=True),
        )
    if operator == "fused_chunk_simple_gla":
        register(add("past-a-segment", all_of_it, {"B": 1, "T": 141, "HK": 2, "H": 4, "K": 3, "V": 5}, **full))


def register_combinations(operator: str) -> None:
    """Every legal set of optional tensors; the flags take turns."""
    optional = tuple(name for name in OPTIONAL if operator != "parallel_simple_gla" or name != "initial_state")
    legal = subsets_of(optional, exclusive=[("g", "g_gamma")], needs={"cu_seqlens_cpu": "cu_seqlens"})
    for i, given in enumerate(legal):
        flags: dict[str, Any] = {"output_final_state": i % 2 == 0}
        if i % 3 == 0:
            flags["scale"] = 0.3
        if i % 4 > 1:
            flags["state_v_first"] = True
        if operator != "parallel_simple_gla" and i % 5 == 0:
            flags["reverse"] = True
        if operator == "simple_gla" and i % 5 in (1, 2):
            flags["mode"] = ("chunk", "fused_chunk")[i % 5 - 1]
        sizes = TINY | {"B": 1, "offsets": (0, 2, 2, 3, 5)} if "cu_seqlens" in given else TINY
        register(case(operator, "+".join(given) or "bare", given, sizes, (COMBINATION,), chunk_size=16, **flags))


STEP_SIZES = {"N": 4, "P": 9, "HK": 3, "H": 6, "K": 5, "V": 7}
SLOTS = (7, -1, 0, 3, 5, 2, 8)  # of the first N sequences; one of them is padding


def step_inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), pool: torch.dtype | None = None, **arguments: Any
) -> Inputs:
    """The arguments of one decode step; the pool is float32 unless told."""
    n, rows, heads, key_heads, key, value = (sizes[letter] for letter in ("N", "P", "H", "HK", "K", "V"))
    rows = rows if "slots" in given else n
    widths = (value, key) if arguments.get("state_v_first") else (key, value)
    built: Inputs = {
        "q": draw.normal("q", (n, key_heads, key)),
        "k": draw.normal("k", (n, key_heads, key), std=key**-0.5),
        "v": draw.normal("v", (n, heads, value)),
        "state": draw.normal("state", (rows, heads, *widths), dtype=pool or draw.wide),
    }
    optional = {
        "g": lambda: draw.decay("g", (n, heads)),
        "g_gamma": lambda: draw.decay("g_gamma", (heads,)),
        "slots": lambda: draw.integers(SLOTS[:n]),
    }
    built |= {name: optional[name]() for name in optional if name in given}
    for name, value in arguments.items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def reference_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    slots: Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence for each sequence, and the pool after it."""
    rows = torch.arange(len(q), device=q.device) if slots is None else slots.long()
    o, pool = torch.zeros_like(v), state.clone()
    used = (rows >= 0).nonzero().squeeze(1)
    step = [None if x is None else x[used, None] for x in (q, k, v, g)]
    outputs, states = reference.recurrent(*step, g_gamma, scale, state[rows[used]], state_v_first=state_v_first)
    o[used] = outputs[:, 0]
    pool[rows[used]] = states.to(pool.dtype)
    return o, pool


def step_case(
    reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
) -> Case:
    """A case of the decode step."""
    return Case(
        id=reason,
        operator="simple_gla_step_",
        build=partial(step_inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_step,
        outputs=("o", "state"),
        tags=frozenset(tags),
    )


def register_steps() -> None:
    """The decode step: pools, slots, padding."""
    register(
        step_case("pool-with-padding", ("g", "slots"), STEP_SIZES, (INDUCTOR, EXPORT, SMALL), scale=0.3),
        step_case("constant-decay", ("g_gamma",), STEP_SIZES, (SMALL,)),
        step_case("bfloat16-pool", ("g", "slots"), STEP_SIZES, pool=torch.bfloat16),
        step_case("float16-pool", ("g", "slots"), STEP_SIZES, (SMALL,), pool=torch.float16),
        step_case("forgets", ("g",), STEP_SIZES, g=lambda g: g.fill_(float("-inf"))),
        step_case("not-contiguous", ("g",), STEP_SIZES, **dict.fromkeys(("q", "k", "v", "g", "state"), strided)),
        step_case("widths-past-a-tile", ("g",), {"N": 2, "P": 2, "HK": 1, "H": 2, "K": 20, "V": 33}, (SMALL,)),
        step_case("value-first", ("g", "slots"), STEP_SIZES, (SMALL,), state_v_first=True),
        step_case("value-first-bfloat16-pool", ("g",), STEP_SIZES, state_v_first=True, pool=torch.bfloat16),
        step_case(
            "value-first-widths-past-a-tile",
            ("g_gamma",),
            {"N": 2, "P": 2, "HK": 1, "H": 2, "K": 33, "V": 20},
            state_v_first=True,
        ),
        step_case("int32-slots", ("slots",), STEP_SIZES, slots=Tensor.int),
    )
    for given in subsets_of(("g", "g_gamma", "slots"), exclusive=[("g", "g_gamma")]):
        register(step_case("+".join(given) or "bare", given, STEP_SIZES, (COMBINATION,)))
        register(
            step_case(
                "value-first+" + ("+".join(given) or "bare"), given, STEP_SIZES, (COMBINATION,), state_v_first=True
            )
        )


for form in FORMS:
    register_scenarios(form)
    register_combinations(form)
register_steps()
serving.register_prefill()
serving.register_advance()
serving.register_record()
