"""Cases of lightning_attn: simple_gla's mathematics with a decay that follows from the head and the layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from fla_ops.lightning_attn import reference
from tests.cases import COMBINATION, EXPORT, INDUCTOR, SMALL, Case, Draw, Inputs, register, strided, subsets_of

FORMS = (
    "chunk_lightning_attn",
    "fused_chunk_lightning_attn",
    "fused_recurrent_lightning_attn",
    "lightning_attn",
)
OPTIONAL = ("initial_state", "cu_seqlens", "cu_seqlens_cpu")
SIZES = {"B": 2, "T": 37, "HK": 3, "H": 6, "K": 10, "V": 7}
TINY = {"B": 2, "T": 5, "HK": 3, "H": 6, "K": 9, "V": 7}
PACK = {"B": 1, "offsets": (0, 0, 1, 20, 20, 37)}  # empty first, one step, empty between, ragged
TINY_PACK = {"B": 1, "offsets": (0, 2, 2, 3, 5)}
LAYER = {"layer_idx": 2, "num_layers": 5}


def inputs(draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), **arguments: Any) -> Inputs:
    """q, k, v and the optional tensors in `given`; a callable argument changes its tensor, others are passed on."""
    heads, key_heads, key, value = (sizes[letter] for letter in ("H", "HK", "K", "V"))
    offsets = sizes.get("offsets") if "cu_seqlens" in given else None
    batch, time = (1, offsets[-1]) if offsets else (sizes["B"], sizes["T"])
    sequences = len(offsets) - 1 if offsets else batch
    built: Inputs = {
        "q": draw.normal("q", (batch, time, key_heads, key)),
        "k": draw.normal("k", (batch, time, key_heads, key), std=key**-0.5),
        "v": draw.normal("v", (batch, time, heads, value)),
    }
    optional = {
        "initial_state": lambda: draw.normal("initial_state", (sequences, heads, key, value), dtype=draw.wide),
        "cu_seqlens": lambda: draw.integers(offsets),
        "cu_seqlens_cpu": lambda: draw.integers(offsets).cpu(),
    }
    built |= {name: optional[name]() for name in OPTIONAL if name in given}
    for name, value in (LAYER | arguments).items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def reference_recurrent(
    output_final_state: bool = False,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence, with the operators' arguments and outputs."""
    same = ("cu_seqlens_cpu", "chunk_size", "mode")  # these do not change the result
    o, state = reference.recurrent(**{name: x for name, x in arguments.items() if name not in same})
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
    if operator == "fused_recurrent_lightning_attn":
        arguments.pop("chunk_size", None)
    return Case(
        id=reason,
        operator=operator,
        build=partial(inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_recurrent,
        outputs=("o", "final_state"),
        differentiable=("q", "k", "v", "initial_state"),
        tags=frozenset(tags),
    )


def register_scenarios(operator: str) -> None:
    """Both rules for the decay, at the first, a middle and the last layer."""
    add = partial(case, operator)
    full = {"output_final_state": True, "chunk_size": 16}
    state, packed = ("initial_state",), ("initial_state", "cu_seqlens")
    first, last = {"layer_idx": 0, "num_layers": 3}, {"layer_idx": 6, "num_layers": 7}
    register(
        add("several-chunks-ragged-tail", state, SIZES, (INDUCTOR, EXPORT, SMALL), **full, scale=0.3),
        add("first-layer", state, SIZES, (SMALL,), **full, **first),
        add("last-layer", state, SIZES, **full, **last),
        add("alibi-first-layer", state, SIZES, (SMALL,), **full, **first, slopes="alibi"),
        add("alibi-last-layer", state, SIZES, **full, **last, slopes="alibi"),
        add("alibi-of-one-layer", (), SIZES, **full, layer_idx=0, num_layers=1, slopes="alibi"),
        add("no-steps", state, SIZES | {"T": 0}, **full),
        add("default-chunk", (), SIZES | {"B": 1, "T": 67, "HK": 2, "H": 4, "K": 3, "V": 5}),
        add("packed-with-empty-and-one-step", packed, SIZES | PACK, **full, slopes="alibi"),
        add("packed-int32-offsets", ("cu_seqlens", "cu_seqlens_cpu"), SIZES | PACK, **full, cu_seqlens=Tensor.int),
        add("not-contiguous", state, SIZES, **full, **dict.fromkeys(("q", "k", "v", "initial_state"), strided)),
    )
    if operator in ("fused_recurrent_lightning_attn", "lightning_attn"):
        register(add("reverse", state, SIZES, (SMALL,), **full, reverse=True))


def register_combinations(operator: str) -> None:
    """Every legal set of optional tensors; the flags take turns."""
    for i, given in enumerate(subsets_of(OPTIONAL, needs={"cu_seqlens_cpu": "cu_seqlens"})):
        flags: dict[str, Any] = {"output_final_state": i % 2 == 0}
        if i % 3 == 0:
            flags |= {"scale": 0.3, "slopes": "alibi"}
        if operator in ("fused_recurrent_lightning_attn", "lightning_attn") and i % 4 == 0:
            flags["reverse"] = True
        if operator == "lightning_attn" and i % 4 in (1, 2):
            flags["mode"] = ("chunk", "fused_chunk")[i % 4 - 1]
        sizes = TINY | TINY_PACK if "cu_seqlens" in given else TINY
        register(case(operator, "+".join(given) or "bare", given, sizes, (COMBINATION,), chunk_size=16, **flags))


for form in FORMS:
    register_scenarios(form)
    register_combinations(form)
