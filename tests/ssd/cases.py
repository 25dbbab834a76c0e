"""Cases of ssd and of its decode step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fla_ops.ssd import reference
from tests.cases import COMBINATION, EXPORT, INDUCTOR, SMALL, Case, Draw, Inputs, register, strided, subsets_of

BESIDE = ("D", "z", "dt_bias")
OPTIONAL = (*BESIDE, "initial_state", "seq_idx", "cu_seqlens", "cu_seqlens_cpu")
ALL = (*BESIDE, "initial_state")

SIZES = {"B": 2, "T": 37, "HK": 3, "H": 6, "K": 10, "V": 7}
TINY = {"B": 2, "T": 5, "HK": 3, "H": 6, "K": 9, "V": 7}
PACK = {"B": 1, "offsets": (0, 0, 1, 20, 20, 37)}  # empty first, one step, empty between, ragged
TINY_PACK = {"B": 1, "offsets": (0, 2, 2, 3, 5)}


def inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), wide: bool = True, **arguments: Any
) -> Inputs:
    """What every call takes and the optional tensors in `given`; a callable argument changes its tensor."""
    heads, groups, key, value = (sizes[letter] for letter in ("H", "HK", "K", "V"))
    offsets = sizes.get("offsets") if "cu_seqlens" in given else None
    batch, time = (1, offsets[-1]) if offsets else (sizes["B"], sizes["T"])
    sequences = len(offsets) - 1 if offsets else batch
    beside = draw.wide if wide else draw.dtype
    built: Inputs = {
        "x": draw.normal("x", (batch, time, heads, value)),
        "dt": draw.decay("dt", (batch, time, heads), 0.1, 1.1, beside),
        "A": draw.decay("A", (heads,), dtype=beside),
        "B": draw.normal("B", (batch, time, groups, key), std=key**-0.5),
        "C": draw.normal("C", (batch, time, groups, key)),
    }
    optional = {
        "D": lambda: draw.normal("D", (heads,), dtype=beside),
        "z": lambda: draw.normal("z", (batch, time, heads, value)),
        "dt_bias": lambda: draw.decay("dt_bias", (heads,), -0.1, 0.1, beside),
        "initial_state": lambda: draw.normal("initial_state", (sequences, heads, value, key), dtype=beside),
        "seq_idx": lambda: (torch.arange(time, device=draw.device) // 3).expand(batch, -1).contiguous(),
        "cu_seqlens": lambda: draw.integers(offsets),
        "cu_seqlens_cpu": lambda: draw.integers(offsets).cpu(),
    }
    built |= {name: optional[name]() for name in OPTIONAL if name in given}
    if arguments.pop("D_by_channel", False):
        built["D"] = draw.normal("D", (heads, value), dtype=beside)
    for name, value in arguments.items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def expected(
    dt_min: float | None = None, dt_max: float | None = None, output_final_state: bool = False, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """The reference, with the operator's arguments and outputs."""
    for name in ("cu_seqlens_cpu", "chunk_size", "mode"):
        arguments.pop(name, None)
    limits = (-math.inf if dt_min is None else dt_min, math.inf if dt_max is None else dt_max)
    o, state = reference.recurrent(**arguments, dt_limit=limits)
    return o, state if output_final_state else None


def as_public(arguments: Inputs) -> Inputs:
    """The public function's arguments: both limits in one."""
    arguments = dict(arguments)
    least, most = arguments.pop("dt_min", None), arguments.pop("dt_max", None)
    return arguments | {"dt_limit": (-math.inf if least is None else least, math.inf if most is None else most)}


def case(
    reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
) -> Case:
    """A case of the whole call."""
    return Case(
        id=reason,
        operator="ssd",
        build=partial(inputs, given=given, **arguments),
        sizes=sizes,
        reference=expected,
        outputs=("o", "final_state"),
        differentiable=("x", "dt", "A", "B", "C", *ALL),
        tags=frozenset(tags),
        public=as_public,
    )


def register_calls() -> None:
    """What surrounds the scan; its own sizes and decays are simple_gla's cases."""
    full: dict[str, Any] = {"output_final_state": True, "chunk_size": 16}
    soft = full | {"dt_softplus": True}
    register(
        case("several-chunks-ragged-tail", ALL, SIZES, (INDUCTOR, EXPORT, SMALL), **soft),
        case("no-steps", ALL, SIZES | {"T": 0}, **soft),
        case("one-step", ALL, SIZES | {"T": 1}, (SMALL,), **soft),
        case("D-by-channel", ALL, SIZES, **soft, D_by_channel=True),
        case("limits", BESIDE, SIZES, **full, dt_min=0.3, dt_max=0.8),
        case("softplus-with-limits", BESIDE, SIZES, **soft, dt_min=0.0, dt_max=1.1),
        case("sequences-by-number", (*ALL, "seq_idx"), SIZES, **soft),
        case("numbers-in-int32", ("seq_idx",), SIZES, **full, seq_idx=Tensor.int),
        case("packed-with-empty-and-one-step", (*ALL, "cu_seqlens"), SIZES | PACK, (SMALL,), **soft),
        case("packed-int32-offsets", ("cu_seqlens", "cu_seqlens_cpu"), SIZES | PACK, **full, cu_seqlens=Tensor.int),
        case("not-contiguous", ALL, SIZES, **soft, **dict.fromkeys(("x", "dt", "B", "C", "z"), strided)),
        case("all-in-the-activations-dtype", ALL, SIZES, **soft, wide=False),
        case("recurrent", ALL, SIZES, **soft, mode="fused_recurrent"),
    )
    chosen = [*subsets_of(ALL), ("seq_idx",), ("cu_seqlens",), ("cu_seqlens", "cu_seqlens_cpu"), (*ALL, "cu_seqlens")]
    for i, given in enumerate((*chosen, (*ALL, "seq_idx"))):
        flags = {"output_final_state": i % 2 == 0, **({"dt_softplus": True} if i % 3 else {})}
        sizes = TINY | TINY_PACK if "cu_seqlens" in given else TINY
        register(case("+".join(given) or "bare", given, sizes, (COMBINATION,), **flags))


STEP_SIZES = {"N": 4, "P": 9, "HK": 3, "H": 6, "K": 5, "V": 7}
SLOTS = (7, -1, 0, 3, 5, 2, 8)  # of the first N sequences; one of them is padding


def step_inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), pool: torch.dtype | None = None, **arguments: Any
) -> Inputs:
    """The arguments of one decode step: those of a call of one step, and a pool, which is float32 unless told."""
    n, rows, heads, key, value = (sizes[letter] for letter in ("N", "P", "H", "K", "V"))
    rows = rows if "slots" in given else n
    whole = inputs(draw, {**sizes, "B": n, "T": 1}, tuple(name for name in given if name != "slots"))
    built = {name: x[:, 0] if name in ("x", "dt", "B", "C", "z") else x for name, x in whole.items()}
    built["state"] = draw.normal("state", (rows, heads, value, key), dtype=pool or draw.wide)
    if "slots" in given:
        built["slots"] = draw.integers(SLOTS[:n])
    if arguments.pop("D_by_channel", False):
        built["D"] = draw.normal("D", (heads, value), dtype=draw.wide)
    for name, value in arguments.items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def reference_step(state: Tensor, slots: Tensor | None = None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """One step of the recurrence for each sequence, and the pool after it."""
    x = arguments["x"]
    rows = torch.arange(len(x), device=x.device) if slots is None else slots.long()
    o, pool = torch.zeros_like(x), state.clone()
    used = (rows >= 0).nonzero().squeeze(1)
    step = {name: y[used, None] if name in ("x", "dt", "B", "C", "z") else y for name, y in arguments.items()}
    outputs, states = reference.recurrent(**step, initial_state=state[rows[used]])
    o[used] = outputs[:, 0]
    pool[rows[used]] = states.to(pool.dtype)
    return o, pool


def step_case(
    reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
) -> Case:
    """A case of the decode step."""
    return Case(
        id=reason,
        operator="ssd_step_",
        build=partial(step_inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_step,
        outputs=("o", "state"),
        tags=frozenset(tags),
    )


def register_steps() -> None:
    """The decode step: pools, slots, padding."""
    soft: dict[str, Any] = {"dt_softplus": True}
    everything = (*BESIDE, "slots")
    register(
        step_case("pool-with-padding", everything, STEP_SIZES, (INDUCTOR, EXPORT, SMALL), **soft),
        step_case("bfloat16-pool", everything, STEP_SIZES, **soft, pool=torch.bfloat16),
        step_case("D-by-channel", ("D", "slots"), STEP_SIZES, **soft, D_by_channel=True),
        step_case("not-contiguous", BESIDE, STEP_SIZES, **dict.fromkeys(("x", "B", "C", "z", "state"), strided)),
        step_case("int32-slots", ("slots",), STEP_SIZES, slots=Tensor.int),
    )
    for i, given in enumerate(subsets_of(everything)):
        register(step_case("+".join(given) or "bare", given, STEP_SIZES, (COMBINATION,), **(soft if i % 2 else {})))


register_calls()
register_steps()
