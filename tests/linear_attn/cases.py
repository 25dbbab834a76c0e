"""Cases of linear_attn and of its normalisation. Queries and keys are positive, as a feature map makes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fla_ops.linear_attn import reference
from tests.cases import COMBINATION, EXPORT, INDUCTOR, SMALL, Case, Draw, Inputs, register, strided, subsets_of

FORMS = ("chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn", "linear_attn")
OPTIONAL = ("initial_state", "initial_z", "cu_seqlens", "cu_seqlens_cpu")
BOTH = ("initial_state", "initial_z")

SIZES = {"B": 2, "T": 37, "HK": 3, "H": 6, "K": 10, "V": 7}
TINY = {"B": 2, "T": 5, "HK": 3, "H": 6, "K": 9, "V": 7}
PACK = {"B": 1, "offsets": (0, 0, 1, 20, 20, 37)}  # empty first, one step, empty between, ragged
TINY_PACK = {"B": 1, "offsets": (0, 2, 2, 3, 5)}


def inputs(
    draw: Draw,
    sizes: Mapping[str, Any],
    values: str,
    given: tuple[str, ...] = (),
    wide: bool = True,
    **arguments: Any,
) -> Inputs:
    """q, k, `values` (v or o) and the optional tensors in `given`; a callable argument changes its tensor."""
    heads, key_heads, key, value = (sizes[letter] for letter in ("H", "HK", "K", "V"))
    offsets = sizes.get("offsets") if "cu_seqlens" in given else None
    batch, time = (1, offsets[-1]) if offsets else (sizes["B"], sizes["T"])
    sequences = len(offsets) - 1 if offsets else batch
    beside = draw.wide if wide else draw.dtype
    built: Inputs = {
        "q": draw.decay("q", (batch, time, key_heads, key), 0.1, 1.1, draw.dtype),
        "k": draw.decay("k", (batch, time, key_heads, key), 0.1, 1.1, draw.dtype),
        values: draw.normal(values, (batch, time, heads, value)),
    }
    optional = {
        "initial_state": lambda: draw.normal("initial_state", (sequences, heads, key, value), dtype=beside),
        "initial_z": lambda: draw.decay("initial_z", (sequences, 1, heads, key), 0.1, 2.1, beside),
        "cu_seqlens": lambda: draw.integers(offsets),
        "cu_seqlens_cpu": lambda: draw.integers(offsets).cpu(),
    }
    built |= {name: optional[name]() for name in OPTIONAL if name in given}
    for name, value in arguments.items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def reference_of(normalize: bool) -> Any:
    """The recurrence with the operators' arguments and outputs; `normalize` is the operator's default."""

    def recurrent(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        initial_z: Tensor | None = None,
        output_final_state: bool = False,
        normalize: bool = normalize,
        cu_seqlens: Tensor | None = None,
        reverse: bool = False,
        **_: Any,  # cu_seqlens_cpu, chunk_size and mode do not change the result
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        o, state, z = reference.recurrent(q, k, v, scale, initial_state, initial_z, normalize, reverse, cu_seqlens)
        return (o, state, z) if output_final_state else (o, None, None)

    return recurrent


def as_pair(arguments: Inputs) -> Inputs:
    """The public functions' arguments: both parts of the state in one."""
    arguments = dict(arguments)
    z = arguments.pop("initial_z", None)
    if z is not None:
        arguments["initial_state"] = (arguments["initial_state"], z)
    return arguments


def case(
    operator: str,
    reason: str,
    given: tuple[str, ...],
    sizes: Mapping[str, Any],
    tags: tuple[str, ...] = (),
    **arguments: Any,
) -> Case:
    """A case of one form; what the form does not take is left out."""
    if operator == "fused_recurrent_linear_attn":
        arguments.pop("chunk_size", None)
    return Case(
        id=reason,
        operator=operator,
        build=partial(inputs, values="v", given=given, **arguments),
        sizes=sizes,
        reference=reference_of(operator != "fused_recurrent_linear_attn"),
        outputs=("o", "final_state", "final_z"),
        differentiable=("q", "k", "v", "initial_state", "initial_z"),
        tags=frozenset(tags),
        public=as_pair,
    )


def register_scenarios(operator: str) -> None:
    """Normalised unless the case is about that; chunks have 16 steps (the normalisation's own have 64)."""
    add = partial(case, operator)
    full = {"output_final_state": True, "normalize": True, "chunk_size": 16}
    plain = full | {"normalize": False}
    strided_inputs = dict.fromkeys(("q", "k", "v", *BOTH), strided)
    packed = (*BOTH, "cu_seqlens")
    register(
        add("several-chunks-ragged-tail", BOTH, SIZES, (INDUCTOR, EXPORT, SMALL), **full, scale=0.3),
        add("from-no-state", (), SIZES, (SMALL,), **full, scale=0.3),
        add("no-steps", BOTH, SIZES | {"T": 0}, **full),
        add("one-step", BOTH, SIZES | {"T": 1}, (SMALL,), **full),
        add("not-normalised", ("initial_state",), SIZES, (SMALL,), **plain),
        add(
            "packed-with-empty-and-one-step",
            packed,
            SIZES | PACK,
            (SMALL, INDUCTOR) if operator == "chunk_linear_attn" else (SMALL,),
            **full,
        ),
        add("packed-int32-offsets", ("cu_seqlens", "cu_seqlens_cpu"), SIZES | PACK, **full, cu_seqlens=Tensor.int),
        add("not-contiguous", BOTH, SIZES, **full, **strided_inputs),
        add("states-in-the-activations-dtype", BOTH, SIZES, **full, wide=False),
        add("widths-past-a-tile", BOTH, SIZES | {"B": 1, "T": 18, "HK": 2, "H": 4, "K": 20, "V": 33}, **full),
        add("default-chunk", (), SIZES | {"B": 1, "T": 67, "HK": 2, "H": 4, "K": 3, "V": 5}, normalize=True),
    )
    if operator in ("fused_recurrent_linear_attn", "linear_attn"):
        register(
            add("reverse", BOTH, SIZES, (SMALL,), **full, reverse=True),
            add("reverse-packed", packed, SIZES | PACK, **full, reverse=True),
        )


def register_combinations(operator: str) -> None:
    """Every legal set of optional tensors; the flags take turns."""
    legal = subsets_of(OPTIONAL, needs={"initial_z": "initial_state", "cu_seqlens_cpu": "cu_seqlens"})
    recurrent = operator == "fused_recurrent_linear_attn"
    for i, given in enumerate(legal):
        flags: dict[str, Any] = {"output_final_state": i % 2 == 0}
        normalize = "initial_z" in given or ("initial_state" not in given and i % 3 != 1)
        if normalize == recurrent:  # not the default
            flags["normalize"] = normalize
        if i % 3 == 0:
            flags["scale"] = 0.3
        if operator in ("fused_recurrent_linear_attn", "linear_attn") and i % 5 == 0:
            flags["reverse"] = True
        if operator == "linear_attn" and i % 5 in (1, 2):
            flags["mode"] = ("chunk", "fused_chunk")[i % 5 - 1]
        sizes = TINY | TINY_PACK if "cu_seqlens" in given else TINY
        register(case(operator, "+".join(given) or "bare", given, sizes, (COMBINATION,), chunk_size=16, **flags))


def reference_normalize(output_final_z: bool = False, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    """The divide step, with the operator's arguments and outputs."""
    arguments.pop("cu_seqlens_cpu", None)
    normalized, z = reference.divide(**arguments)
    return normalized, z if output_final_z else None


def normalize_case(
    reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
) -> Case:
    """A case of the divide step."""
    return Case(
        id=reason,
        operator="normalize_output",
        build=partial(inputs, values="o", given=given, **arguments),
        sizes=sizes,
        reference=reference_normalize,
        outputs=("normalized", "final_z"),
        differentiable=("q", "k", "o", "initial_z"),
        tags=frozenset(tags),
    )


def register_normalize() -> None:
    """The divide step: several of its chunks, both directions, packs."""
    long, full = SIZES | {"T": 141}, {"output_final_z": True}
    long_pack = SIZES | {"B": 1, "offsets": (0, 0, 70, 71, 71, 200)}
    packed = ("initial_z", "cu_seqlens")
    register(
        normalize_case("ragged-tail", ("initial_z",), SIZES, (INDUCTOR, EXPORT, SMALL), **full, scale=0.3),
        normalize_case("several-chunks", ("initial_z",), long, (SMALL,), **full),
        normalize_case("several-chunks-reversed", ("initial_z",), long, (SMALL,), **full, reverse=True),
        normalize_case("one-sum-for-a-group", (), long, **full, scale=0.3),
        normalize_case("no-steps", ("initial_z",), SIZES | {"T": 0}, **full),
        normalize_case("one-step", ("initial_z",), SIZES | {"T": 1}, (SMALL,), **full),
        normalize_case("packed-with-empty-and-one-step", packed, long_pack, (SMALL, INDUCTOR), **full),
        normalize_case("packed-reversed", packed, long_pack, (SMALL,), **full, reverse=True),
        normalize_case("packed-int32-offsets", ("cu_seqlens",), long_pack, **full, cu_seqlens=Tensor.int),
        normalize_case(
            "not-contiguous", ("initial_z",), SIZES, **full, **dict.fromkeys(("q", "k", "o", "initial_z"), strided)
        ),
        normalize_case("widths-past-a-tile", (), SIZES | {"T": 18, "K": 70, "V": 65}, (SMALL,), **full),
    )
    optional = ("initial_z", "cu_seqlens", "cu_seqlens_cpu")
    for i, given in enumerate(subsets_of(optional, needs={"cu_seqlens_cpu": "cu_seqlens"})):
        sizes = TINY | TINY_PACK if "cu_seqlens" in given else TINY
        flags = {"output_final_z": i % 2 == 0, "reverse": i % 3 == 1, **({"scale": None} if i % 3 else {})}
        register(normalize_case("+".join(given) or "bare", given, sizes, (COMBINATION,), **flags))


STEP_SIZES = {"N": 4, "P": 9, "HK": 3, "H": 6, "K": 5, "V": 7}
SLOTS = (7, -1, 0, 3, 5, 2, 8)  # of the first N sequences; one of them is padding


def step_inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), pool: torch.dtype | None = None, **arguments: Any
) -> Inputs:
    """The arguments of one decode step; the pools are float32 unless told."""
    n, rows, heads, key_heads, key, value = (sizes[letter] for letter in ("N", "P", "H", "HK", "K", "V"))
    rows = rows if "slots" in given else n
    widths = (value, key) if arguments.get("state_v_first") else (key, value)
    built: Inputs = {
        "q": draw.decay("q", (n, key_heads, key), 0.1, 1.1, draw.dtype),
        "k": draw.decay("k", (n, key_heads, key), 0.1, 1.1, draw.dtype),
        "v": draw.normal("v", (n, heads, value)),
        "state": draw.normal("state", (rows, heads, *widths), dtype=pool or draw.wide),
        "z": draw.decay("z", (rows, 1, heads, key), 0.1, 2.1, pool or draw.wide),
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
    z: Tensor,
    scale: float | None = None,
    slots: Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the recurrence for each sequence, and both pools after it."""
    rows = torch.arange(len(q), device=q.device) if slots is None else slots.long()
    o, states, sums = torch.zeros_like(v), state.clone(), z.clone()
    used = (rows >= 0).nonzero().squeeze(1)
    at = rows[used]
    before = state[at].mT if state_v_first else state[at]
    outputs, after, new_z = reference.recurrent(*(x[used, None] for x in (q, k, v)), scale, before, z[at])
    o[used] = outputs[:, 0]
    states[at], sums[at] = (after.mT if state_v_first else after).to(states.dtype), new_z.to(sums.dtype)
    return o, states, sums


def step_case(
    reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
) -> Case:
    """A case of the decode step."""
    return Case(
        id=reason,
        operator="linear_attn_step_",
        build=partial(step_inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_step,
        outputs=("o", "state", "z"),
        tags=frozenset(tags),
    )


def register_steps() -> None:
    """The decode step: pools, slots, padding."""
    wide = {"N": 2, "P": 2, "HK": 1, "H": 2, "K": 20, "V": 33}
    register(
        step_case("pool-with-padding", ("slots",), STEP_SIZES, (INDUCTOR, EXPORT, SMALL), scale=0.3),
        step_case("bfloat16-pool", ("slots",), STEP_SIZES, pool=torch.bfloat16),
        step_case("float16-pool", ("slots",), STEP_SIZES, (SMALL,), pool=torch.float16),
        step_case("not-contiguous", (), STEP_SIZES, **dict.fromkeys(("q", "k", "v", "state", "z"), strided)),
        step_case("widths-past-a-tile", (), wide, (SMALL,)),
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
register_normalize()
register_steps()
