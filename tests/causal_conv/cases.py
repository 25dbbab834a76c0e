"""Cases of causal_conv and of its decode step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fla_ops.causal_conv import reference
from tests.cases import COMBINATION, EXPORT, INDUCTOR, SMALL, Case, Draw, Inputs, register, strided, subsets_of

OPTIONAL = ("bias", "initial_state", "cu_seqlens", "cu_seqlens_cpu")
BOTH = ("bias", "initial_state")

SIZES = {"B": 2, "T": 37, "D": 6, "W": 4, "W-1": 3}
TINY = SIZES | {"T": 5}
PACK = {"B": 1, "offsets": (0, 0, 1, 20, 20, 37)}  # empty first, one step, empty between, ragged
TINY_PACK = {"B": 1, "offsets": (0, 2, 2, 3, 5)}  # all shorter than the taps


def inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), wide: bool = True, **arguments: Any
) -> Inputs:
    """x, weight and the optional tensors in `given`; a callable argument changes its tensor, others are passed on."""
    channels, taps = sizes["D"], sizes["W"]
    offsets = sizes.get("offsets") if "cu_seqlens" in given else None
    batch, time = (1, offsets[-1]) if offsets else (sizes["B"], sizes["T"])
    sequences = len(offsets) - 1 if offsets else batch
    beside = draw.wide if wide else draw.dtype
    built: Inputs = {
        "x": draw.normal("x", (batch, time, channels)),
        "weight": draw.normal("weight", (channels, taps), std=0.7, dtype=beside),
    }
    optional = {
        "bias": lambda: draw.normal("bias", (channels,), dtype=beside),
        "initial_state": lambda: draw.normal("initial_state", (sequences, channels, taps - 1), dtype=beside),
        "cu_seqlens": lambda: draw.integers(offsets),
        "cu_seqlens_cpu": lambda: draw.integers(offsets).cpu(),
    }
    built |= {name: optional[name]() for name in OPTIONAL if name in given}
    for name, value in arguments.items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def expected(output_final_state: bool = False, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    """The reference, with the operator's arguments and outputs."""
    arguments.pop("cu_seqlens_cpu", None)
    o, state = reference.convolve(**arguments)
    return o, state if output_final_state else None


def case(
    reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
) -> Case:
    """A case of the convolution."""
    return Case(
        id=reason,
        operator="causal_conv",
        build=partial(inputs, given=given, **arguments),
        sizes=sizes,
        reference=expected,
        outputs=("o", "final_state"),
        differentiable=("x", "weight", "bias", "initial_state"),
        tags=frozenset(tags),
    )


def of_width(taps: int) -> dict[str, int]:
    """The sizes with so many taps."""
    return SIZES | {"W": taps, "W-1": taps - 1}


def register_convolutions() -> None:
    """Lengths about that of the taps, packs, both activations, every width."""
    full: dict[str, Any] = {"output_final_state": True, "activation": "silu"}
    packed = (*BOTH, "cu_seqlens")
    register(
        case("ragged-tail", BOTH, SIZES, (INDUCTOR, EXPORT, SMALL), **full),
        case("no-activation", BOTH, SIZES, (SMALL,), output_final_state=True),
        case("no-steps", BOTH, SIZES | {"T": 0}, **full),
        case("one-step", BOTH, SIZES | {"T": 1}, (SMALL,), **full),
        case("fewer-steps-than-taps", BOTH, of_width(8) | {"T": 3}, (SMALL,), **full),
        case("from-no-state", ("bias",), SIZES | {"T": 2}, (SMALL,), **full),
        case("one-tap", BOTH, of_width(1), (SMALL,), **full),
        case("two-taps", (), of_width(2), (SMALL,), activation="swish"),
        case("eight-taps", BOTH, of_width(8), **full),
        case("several-windows", BOTH, SIZES | {"T": 141}, **full),
        case("channels-past-a-tile", ("bias",), SIZES | {"T": 9, "D": 275}, **full),
        case("packed-with-empty-and-one-step", packed, SIZES | PACK, (INDUCTOR, SMALL), **full),
        case("packed-from-no-state", ("bias", "cu_seqlens"), SIZES | PACK, (SMALL,), **full),
        case("packed-int32-offsets", ("cu_seqlens", "cu_seqlens_cpu"), SIZES | PACK, **full, cu_seqlens=Tensor.int),
        case("not-contiguous", BOTH, SIZES, **full, **dict.fromkeys(("x", "weight", *BOTH), strided)),
        case("channels-first", BOTH, SIZES, (SMALL,), **full, x=lambda x: x.mT.contiguous().mT),
        case("all-in-the-activations-dtype", BOTH, SIZES, **full, wide=False),
    )
    for i, given in enumerate(subsets_of(OPTIONAL, needs={"cu_seqlens_cpu": "cu_seqlens"})):
        flags = {"output_final_state": i % 2 == 0, **({"activation": "silu"} if i % 3 else {})}
        sizes = TINY | TINY_PACK if "cu_seqlens" in given else TINY
        register(case("+".join(given) or "bare", given, sizes, (COMBINATION,), **flags))


STEP_SIZES = {"N": 4, "P": 9, "D": 6, "W": 4, "S": 5}
SLOTS = (7, -1, 0, 3, 5, 2, 8)  # of the first N sequences; one of them is padding


def step_inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), pool: torch.dtype | None = None, **arguments: Any
) -> Inputs:
    """The arguments of one decode step; the pool is float32 unless told."""
    n, rows, channels, taps, held = (sizes[letter] for letter in ("N", "P", "D", "W", "S"))
    rows = rows if "slots" in given else n
    built: Inputs = {
        "x": draw.normal("x", (n, channels)),
        "state": draw.normal("state", (rows, channels, held), dtype=pool or draw.wide),
        "weight": draw.normal("weight", (channels, taps), std=0.7, dtype=draw.wide),
    }
    optional = {
        "bias": lambda: draw.normal("bias", (channels,), dtype=draw.wide),
        "slots": lambda: draw.integers(SLOTS[:n]),
    }
    built |= {name: optional[name]() for name in optional if name in given}
    for name, value in arguments.items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def step_case(
    reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
) -> Case:
    """A case of the decode step."""
    return Case(
        id=reason,
        operator="causal_conv_step_",
        build=partial(step_inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference.step,
        outputs=("o", "state"),
        tags=frozenset(tags),
    )


def register_steps() -> None:
    """The decode step: pools that hold as many steps as it sees, or more; slots, padding."""
    both = ("bias", "slots")
    silu: dict[str, Any] = {"activation": "silu"}
    everything = dict.fromkeys(("x", "state", "weight"), strided)
    register(
        step_case("pool-with-padding", both, STEP_SIZES, (INDUCTOR, EXPORT, SMALL), **silu),
        step_case("least-state", both, STEP_SIZES | {"S": 3}, (SMALL,), **silu),
        step_case("as-many-steps-as-taps", ("bias",), STEP_SIZES | {"S": 4}, **silu),
        step_case("one-tap-without-state", ("bias",), STEP_SIZES | {"W": 1, "S": 0}, **silu),
        step_case("one-tap-with-state", ("bias",), STEP_SIZES | {"W": 1, "S": 2}, (SMALL,), **silu),
        step_case("eight-taps", ("bias",), STEP_SIZES | {"W": 8, "S": 7}, (SMALL,), **silu),
        step_case("channels-past-a-tile", both, STEP_SIZES | {"D": 275}, **silu),
        step_case("bfloat16-pool", both, STEP_SIZES, pool=torch.bfloat16),
        step_case("float16-pool", both, STEP_SIZES, (SMALL,), pool=torch.float16),
        step_case("not-contiguous", (), STEP_SIZES, **everything),
        step_case("channels-side-by-side", both, STEP_SIZES, (SMALL,), state=lambda x: x.mT.contiguous().mT),
        step_case("int32-slots", ("slots",), STEP_SIZES, slots=Tensor.int),
    )
    for i, given in enumerate(subsets_of(both)):
        register(step_case("+".join(given) or "bare", given, STEP_SIZES, (COMBINATION,), **(silu if i % 2 else {})))


register_convolutions()
register_steps()
