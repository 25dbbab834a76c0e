"""Cases of the gated delta rule: every form runs the same scenarios, so that a difference between forms shows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fla_ops.gated_delta_rule import reference
from tests.cases import COMBINATION, EXPORT, INDUCTOR, SMALL, Case, Draw, Inputs, register, strided, subsets_of

DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "initial_state")
FORMS = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", "gated_delta_rule")
OPTIONAL = ("g", "initial_state", "cu_seqlens", "cu_seqlens_cpu")

SIZES = {"B": 2, "T": 37, "HK": 3, "H": 6, "K": 10, "V": 7}
TINY = {"B": 2, "T": 5, "HK": 3, "H": 6, "K": 9, "V": 7}
PACK = {"B": 1, "offsets": (0, 0, 1, 20, 20, 37)}  # empty first, one step, empty between, ragged


def strength(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """beta, between 0 and 1."""
    return draw.decay("beta", shape, low=0.0, high=1.0, dtype=dtype)


def inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), wide: bool = True, **arguments: Any
) -> Inputs:
    """q, k, v, beta and the optional tensors in `given`; a callable argument changes its tensor, others pass."""
    heads, key_heads, key, value = (sizes[letter] for letter in ("H", "HK", "K", "V"))
    offsets = sizes.get("offsets") if "cu_seqlens" in given else None
    batch, time = (1, offsets[-1]) if offsets else (sizes["B"], sizes["T"])
    sequences = len(offsets) - 1 if offsets else batch
    widths = (value, key) if arguments.get("state_v_first") else (key, value)
    beside = draw.wide if wide else draw.dtype
    built: Inputs = {
        "q": draw.normal("q", (batch, time, key_heads, key)),
        "k": draw.normal("k", (batch, time, key_heads, key), std=key**-0.5),
        "v": draw.normal("v", (batch, time, heads, value)),
        "g": draw.decay("g", (batch, time, heads), dtype=beside) if "g" in given else None,
        "beta": strength(draw, (batch, time, heads), beside),
    }
    optional = {
        "initial_state": lambda: draw.normal("initial_state", (sequences, heads, *widths), dtype=beside),
        "cu_seqlens": lambda: draw.integers(offsets),
        "cu_seqlens_cpu": lambda: draw.integers(offsets).cpu(),
    }
    built |= {name: optional[name]() for name in optional if name in given}
    for name, value in arguments.items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def reference_recurrent(output_final_state: bool = False, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    """The recurrence, with the operators' arguments and outputs; some arguments do not change the result."""
    for name in ("cu_seqlens_cpu", "chunk_size", "mode"):
        arguments.pop(name, None)
    o, state = reference.recurrent(**arguments)
    return o, state if output_final_state else None


def case(
    operator: str,
    reason: str,
    given: tuple[str, ...],
    sizes: Mapping[str, Any],
    tags: tuple[str, ...] = (),
    **arguments: Any,
) -> Case:
    """A case of one form; what the form does not take is left out."""
    if operator == "fused_recurrent_gated_delta_rule":
        arguments.pop("chunk_size", None)
    return Case(
        id=reason,
        operator=operator,
        build=partial(inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_recurrent,
        outputs=("o", "final_state"),
        differentiable=DIFFERENTIABLE,
        tags=frozenset(tags),
    )


def resets(g: Tensor) -> Tensor:
    """Strong decays among ordinary ones: at the first step, in a chunk, at its edge, two in a row, in one head only."""
    for step, value in ((0, -1e4), (9, float("-inf")), (15, -1e4), (16, float("-inf")), (17, -1e4), (18, -45.0)):
        g[:, step] = value
    g[:, 25, 2] = float("-inf")
    return g


def register_scenarios(operator: str) -> None:
    """Sizes, decays, strengths where implementations go wrong. Chunks have 16 steps unless the case is about that."""
    all_of_it = ("g", "initial_state")
    add = partial(case, operator)
    full = {"output_final_state": True, "chunk_size": 16}
    wide = {"B": 1, "T": 67, "HK": 2, "H": 4, "K": 3, "V": 5}
    strided_inputs = dict.fromkeys(("q", "k", "v", "g", "beta", "initial_state"), strided)
    register(
        add("several-chunks-ragged-tail", all_of_it, SIZES, (INDUCTOR, EXPORT, SMALL), **full, scale=0.3),
        add("no-steps", all_of_it, SIZES | {"T": 0}, **full),
        add("one-step", all_of_it, SIZES | {"T": 1}, (SMALL,), **full),
        add("one-whole-chunk", ("g",), SIZES | {"T": 16}, **full),
        add("no-decay", ("initial_state",), SIZES, **full),
        add("strong-decay", all_of_it, SIZES, (SMALL,), **full, g=resets),
        add("growth", all_of_it, SIZES, **full, g=lambda g: 0.7 * g + 0.3),
        add("nothing-is-learnt", all_of_it, SIZES, **full, beta=Tensor.zero_),
        add("negative-eigenvalues", all_of_it, SIZES, **full, beta=lambda x: 2 * x, use_qk_l2norm_in_kernel=True),
        add("normalized", all_of_it, SIZES, (SMALL,), **full, use_qk_l2norm_in_kernel=True),
        add("normalized-zeros", all_of_it, SIZES, **full, use_qk_l2norm_in_kernel=True, k=lambda k: k * (k > 1)),
        add("packed", ("g", "initial_state", "cu_seqlens"), SIZES | PACK, (INDUCTOR, SMALL), **full),
        add("packed-int32-offsets", ("cu_seqlens", "cu_seqlens_cpu"), SIZES | PACK, **full, cu_seqlens=Tensor.int),
        add("not-contiguous", all_of_it, SIZES, (SMALL,), **full, **strided_inputs),
        add("gates-and-state-in-the-activations-dtype", all_of_it, SIZES, **full, wide=False),
        add("one-head-per-value-head", ("g",), SIZES | {"B": 3, "HK": 2, "H": 2}, **full),
        add("widths-past-a-tile", all_of_it, {"B": 1, "T": 18, "HK": 2, "H": 4, "K": 20, "V": 33}, (SMALL,), **full),
        add("default-chunk", all_of_it, wide, output_final_state=True, use_qk_l2norm_in_kernel=True),
        add("state-value-first", all_of_it, SIZES, (SMALL,), **full, state_v_first=True),
        add("output-only", all_of_it, SIZES, chunk_size=32),
    )


def register_combinations(operator: str) -> None:
    """Every legal set of optional tensors; the flags take turns."""
    for i, given in enumerate(subsets_of(OPTIONAL, needs={"cu_seqlens_cpu": "cu_seqlens"})):
        flags: dict[str, Any] = {"output_final_state": i % 2 == 0}
        if i % 3 == 0:
            flags["scale"] = 0.3
        if i % 3 == 1:
            flags["use_qk_l2norm_in_kernel"] = True
        if i % 4 > 1:
            flags["state_v_first"] = True
        if operator == "gated_delta_rule" and i % 5 in (1, 2):
            flags["mode"] = ("chunk", "fused_recurrent")[i % 5 - 1]
        sizes = TINY | {"B": 1, "offsets": (0, 2, 2, 3, 5)} if "cu_seqlens" in given else TINY
        register(case(operator, "+".join(given) or "bare", given, sizes, (COMBINATION,), chunk_size=16, **flags))


STEP_SIZES = {"N": 4, "P": 9, "HK": 3, "H": 6, "K": 5, "V": 7}
SLOTS = (7, -1, 0, 3, 5, 2, 8)  # of the first N sequences; one of them is padding


def step_inputs(
    draw: Draw, sizes: Mapping[str, int], given: tuple[str, ...] = (), pool: torch.dtype | None = None, **arguments: Any
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
        "g": draw.decay("g", (n, heads)) if "g" in given else None,
        "beta": strength(draw, (n, heads), draw.wide),
    }
    if "slots" in given:
        built["slots"] = draw.integers(SLOTS[:n])
    for name, value in arguments.items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def reference_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    slots: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence for each sequence, and the pool after it."""
    rows = torch.arange(len(q), device=q.device) if slots is None else slots.long()
    o, pool = torch.zeros_like(v), state.clone()
    used = (rows >= 0).nonzero().squeeze(1)
    step = [None if x is None else x[used, None] for x in (q, k, v, g, beta)]
    outputs, states = reference.recurrent(
        *step, scale, state[rows[used]], use_qk_l2norm_in_kernel, state_v_first=state_v_first
    )
    o[used] = outputs[:, 0]
    pool[rows[used]] = states.to(pool.dtype)
    return o, pool


def step_case(
    reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
) -> Case:
    """A case of the decode step."""
    return Case(
        id=reason,
        operator="gated_delta_rule_step_",
        build=partial(step_inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_step,
        outputs=("o", "state"),
        tags=frozenset(tags),
    )


def register_steps() -> None:
    """The decode step: pools, slots, padding."""
    past_a_tile = {"N": 2, "P": 2, "HK": 1, "H": 2, "K": 20, "V": 33}
    register(
        step_case("pool-with-padding", ("g", "slots"), STEP_SIZES, (INDUCTOR, EXPORT, SMALL), scale=0.3),
        step_case("normalized", ("g",), STEP_SIZES, (SMALL,), use_qk_l2norm_in_kernel=True),
        step_case("bfloat16-pool", ("g", "slots"), STEP_SIZES, pool=torch.bfloat16),
        step_case("float16-pool", ("g", "slots"), STEP_SIZES, (SMALL,), pool=torch.float16),
        step_case("forgets", ("g",), STEP_SIZES, g=lambda g: g.fill_(float("-inf"))),
        step_case(
            "not-contiguous", ("g",), STEP_SIZES, **dict.fromkeys(("q", "k", "v", "g", "beta", "state"), strided)
        ),
        step_case("widths-past-a-tile", ("g",), past_a_tile, (SMALL,)),
        step_case("value-first", ("g", "slots"), STEP_SIZES, (SMALL,), state_v_first=True),
        step_case("value-first-bfloat16-pool", ("g",), STEP_SIZES, state_v_first=True, pool=torch.bfloat16),
        step_case("value-first-widths-past-a-tile", (), past_a_tile | {"K": 33, "V": 20}, state_v_first=True),
        step_case("int32-slots", ("slots",), STEP_SIZES, slots=Tensor.int),
    )
    for given in subsets_of(("g", "slots")):
        register(step_case("+".join(given) or "bare", given, STEP_SIZES, (COMBINATION,)))
        reason = "value-first+" + ("+".join(given) or "bare")
        flags = {"state_v_first": True, "use_qk_l2norm_in_kernel": True}
        register(step_case(reason, given, STEP_SIZES, (COMBINATION,), **flags))


for form in FORMS:
    register_scenarios(form)
    register_combinations(form)
register_steps()
