"""Cases of attn: the parallel form and its dispatcher run the same scenarios, then the decode step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fla_ops.attn import reference
from fla_ops.attn.call import DECODING_AXES
from tests.cases import COMBINATION, EXPORT, INDUCTOR, SMALL, Case, Draw, Inputs, register, strided, subsets_of

DIFFERENTIABLE = ("q", "k", "v", "g", "sink_bias")
FORMS = ("parallel_attn", "attn")
OPTIONAL = ("g", "sink_bias", "cu_seqlens", "chunk_indices")

SIZES = {"B": 2, "T": 37, "H": 3, "HQ": 6, "K": 10, "V": 7, "chunks": 8}
TINY = SIZES | {"T": 5, "K": 9}
PACK = {"B": 1, "offsets": (0, 0, 1, 20, 20, 37)}  # empty first, one step, empty between, ragged


def inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), wide: bool = True, **arguments: Any
) -> Inputs:
    """q, k, v and the optional tensors in `given`; a callable argument changes its tensor, others are passed on."""
    heads, query_heads, key, value = (sizes[letter] for letter in ("H", "HQ", "K", "V"))
    offsets = sizes.get("offsets") if "cu_seqlens" in given else None
    batch, time = (1, offsets[-1]) if offsets else (sizes["B"], sizes["T"])
    beside = draw.wide if wide else draw.dtype
    built: Inputs = {
        "q": draw.normal("q", (batch, time, query_heads, key)),
        "k": draw.normal("k", (batch, time, heads, key)),
        "v": draw.normal("v", (batch, time, heads, value)),
    }
    optional = {
        "g": lambda: draw.decay("g", (batch, time, query_heads), dtype=beside),
        "sink_bias": lambda: draw.normal("sink_bias", (query_heads,), dtype=beside),
        "cu_seqlens": lambda: draw.integers(offsets),
        "chunk_indices": lambda: draw.integers([0] * (2 * sizes["chunks"])).view(-1, 2),  # not read
    }
    built |= {name: optional[name]() for name in OPTIONAL if name in given}
    for name, value in arguments.items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def reference_parallel(**inputs: Any) -> tuple[Tensor]:
    """The definition, with the operators' arguments and output."""
    inputs = {name: x for name, x in inputs.items() if name not in ("chunk_indices", "mode")}
    return (reference.parallel(**inputs)[0],)


def case(
    operator: str,
    reason: str,
    given: tuple[str, ...],
    sizes: Mapping[str, Any],
    tags: tuple[str, ...] = (),
    **arguments: Any,
) -> Case:
    """A case of the parallel form."""
    return Case(
        id=reason,
        operator=operator,
        build=partial(inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_parallel,
        outputs=("o",),
        differentiable=DIFFERENTIABLE,
        tags=frozenset(tags),
    )


def resets(g: Tensor) -> Tensor:
    """Strong decays among ordinary ones: at the first step, at a block's edge, two in a row, in one head only."""
    for step, value in ((0, -1e4), (9, float("-inf")), (15, -1e4), (16, float("-inf")), (17, -1e4), (18, -45.0)):
        g[:, step] = value
    g[:, 25, 2] = float("-inf")
    return g


def large_scores(q: Tensor) -> Tensor:
    """Scores of some hundreds: a softmax without a running maximum overflows, and scores make up for decays."""
    return 60 * q


def rising_scores(k: Tensor) -> Tensor:
    """Early keys are far longer than late ones, so that a row's largest score is far from its diagonal."""
    return k * torch.linspace(90, 1, k.shape[1], dtype=k.dtype, device=k.device)[:, None, None]


def register_scenarios(operator: str) -> None:
    """Sizes, decays and windows where implementations go wrong."""
    add = partial(case, operator)
    strided_inputs = dict.fromkeys(("q", "k", "v", "g", "sink_bias"), strided)
    all_of_it = ("g", "sink_bias")
    small = SIZES | {"B": 1, "H": 2, "HQ": 4}
    register(
        add("everything", all_of_it, SIZES, (INDUCTOR, EXPORT, SMALL), window_size=23, scale=0.3),
        add("no-steps", all_of_it, SIZES | {"T": 0}, window_size=3),
        add("one-step", all_of_it, SIZES | {"T": 1}, (SMALL,), window_size=3),
        add("plain", (), SIZES | {"T": 19}),
        add("decay-only", ("g",), small | {"T": 41}, (SMALL,)),
        add("sinks-only", ("sink_bias",), SIZES),
        add("strong-decay", all_of_it, SIZES, (SMALL,), g=resets),
        add("strong-decay-and-window", all_of_it, SIZES, g=resets, window_size=9),
        add("decays-of-tens", all_of_it, SIZES, g=lambda g: 60 * g),
        add("growth", all_of_it, SIZES, g=lambda g: 0.7 * g + 0.3),
        add("window-of-one", ("sink_bias",), SIZES | {"T": 18}, (SMALL,), window_size=1),
        add("window-of-none", all_of_it, SIZES | {"T": 18}, (SMALL,), window_size=0),
        add("packed-window-of-none", (*all_of_it, "cu_seqlens"), SIZES | PACK, window_size=0),
        add("window-past-the-end", ("g",), SIZES | {"T": 18}, window_size=100),
        add("window-of-a-block", (), small | {"T": 75, "K": 3, "V": 5}, window_size=32),
        add("large-scores", ("g",), SIZES, q=large_scores),
        add("largest-score-first", all_of_it, SIZES, (SMALL,), k=rising_scores),
        add("sinks-that-win", ("sink_bias",), SIZES, sink_bias=lambda x: 10 * x + 20),
        add(
            "sinks-that-are-off",
            ("sink_bias",),
            SIZES,
            sink_bias=lambda x: x.index_fill(0, x.new_tensor([1, 4]).long(), float("-inf")),
        ),
        add(
            "packed-with-empty-and-one-step",
            OPTIONAL,
            SIZES | PACK,
            (INDUCTOR, SMALL),
            window_size=11,
            scale=0.3,
        ),
        add("packed-plain", ("cu_seqlens",), SIZES | PACK),
        add("packed-int32-offsets", ("g", "cu_seqlens", "chunk_indices"), SIZES | PACK, cu_seqlens=Tensor.int),
        add("not-contiguous", all_of_it, SIZES, (SMALL,), window_size=20, **strided_inputs),
        add("gates-and-sinks-in-the-activations-dtype", all_of_it, SIZES, wide=False),
        add("one-query-head-per-key-head", all_of_it, SIZES | {"B": 3, "H": 2, "HQ": 2}),
        add("one-key-head", all_of_it, SIZES | {"B": 1, "H": 1, "HQ": 5}, (SMALL,)),
        add("widths-past-a-tile", all_of_it, small | {"T": 18, "K": 20, "V": 33}, (SMALL,)),
    )


def register_combinations(operator: str) -> None:
    """Every legal set of optional tensors; the other arguments take turns."""
    for i, given in enumerate(subsets_of(OPTIONAL, needs={"chunk_indices": "cu_seqlens"})):
        others: dict[str, Any] = {}
        if i % 2 == 0:
            others["window_size"] = 3
        if i % 3 == 0:
            others["scale"] = 0.3
        if operator == "attn" and i % 3 == 1:
            others["mode"] = "parallel"
        sizes = TINY | {"B": 1, "offsets": (0, 2, 2, 3, 5)} if "cu_seqlens" in given else TINY
        register(case(operator, "+".join(given) or "bare", given, sizes, (COMBINATION,), **others))


CACHES = {"B": 1, "offsets": (0, 19, 19, 20, 57)}  # ragged, empty, one step, and one of several blocks
STEP_SIZES = {"H": 3, "HQ": 6, "K": 10, "V": 7, **CACHES}


def step_inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), wide: bool = True, **arguments: Any
) -> Inputs:
    """One query for each cache, the caches (size "N" says how many times over), and the optional tensors in `given`."""
    heads, query_heads, key, value = (sizes[letter] for letter in ("H", "HQ", "K", "V"))
    offsets, beside = [0], draw.wide if wide else draw.dtype
    for _ in range(sizes.get("N") or 1):
        offsets += [offsets[-1] + end for end in sizes["offsets"][1:]]
    time = offsets[-1]
    built: Inputs = {
        "q": draw.normal("q", (1, len(offsets) - 1, query_heads, key)),
        "k": draw.normal("k", (1, time, heads, key)),
        "v": draw.normal("v", (1, time, heads, value)),
        "g": None,
        "scale": None,
        "cu_seqlens": draw.integers(offsets),
    }
    if "g" in given:
        built["g"] = draw.decay("g", (1, time, query_heads), dtype=beside)
    if "sink_bias" in given:
        built["sink_bias"] = draw.normal("sink_bias", (query_heads,), dtype=beside)
    for name, value in arguments.items():
        built[name] = value(built[name]) if callable(value) else value
    return built


def reference_step(g: Tensor | None = None, scale: float | None = None, **inputs: Any) -> tuple[Tensor]:
    """One decode step by the definition, with the operators' arguments and output."""
    inputs = {name: x for name, x in inputs.items() if name not in ("chunk_indices", "mode")}
    return (reference.one_step(g=g, scale=scale, **inputs),)


def step_case(
    operator: str,
    reason: str,
    given: tuple[str, ...],
    sizes: Mapping[str, Any],
    tags: tuple[str, ...] = (),
    **arguments: Any,
) -> Case:
    """A case of the decode step."""
    return Case(
        id=reason,
        operator=operator,
        build=partial(step_inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference_step,
        outputs=("o",),
        axes=DECODING_AXES,
        tags=frozenset(tags),
    )


def forgetting(g: Tensor) -> Tensor:
    """Steps that forget: the newest of one cache, one in the middle of another."""
    g[:, 18], g[:, 40], g[:, 50] = -1e4, float("-inf"), -45.0
    return g


def register_steps() -> None:
    """The decode step: caches of several lengths, windows, sinks, decay."""
    add = partial(step_case, "attn_decoding_one_step")
    every = ("g", "sink_bias")
    strided_inputs = dict.fromkeys(("q", "k", "v", "g", "sink_bias"), strided)
    register(
        add("everything", every, STEP_SIZES, (INDUCTOR, EXPORT, SMALL), window_size=23, scale=0.3, do_gate_scale=True),
        add("plain", (), STEP_SIZES, (SMALL,)),
        add("strong-decay", every, STEP_SIZES, (SMALL,), g=forgetting),
        add("strong-decay-scaled", ("g",), STEP_SIZES, g=forgetting, do_gate_scale=True),
        add("window-of-one", every, STEP_SIZES, window_size=1),
        add("window-of-none", every, STEP_SIZES, (SMALL,), window_size=0),
        add("large-scores", ("g",), STEP_SIZES, q=large_scores),
        add("no-caches", every, STEP_SIZES | {"offsets": (0, 0, 0)}),
        add("not-contiguous", every, STEP_SIZES, (SMALL,), **strided_inputs),
        add("gates-and-sinks-in-the-activations-dtype", every, STEP_SIZES, wide=False),
        add("int32-offsets", (), STEP_SIZES, cu_seqlens=Tensor.int),
        add("many-query-heads", every, STEP_SIZES | {"H": 1, "HQ": 19}, (SMALL,)),
        add("widths-past-a-tile", every, STEP_SIZES | {"K": 20, "V": 33, "offsets": (0, 3, 25)}, (SMALL,)),
        step_case("attn", "decoding", every, STEP_SIZES, (INDUCTOR, SMALL), window_size=23, do_gate_scale=True),
        step_case("attn", "decoding-by-name", (), STEP_SIZES | {"offsets": (0, 2, 2)}, mode="decoding"),
    )
    for i, given in enumerate(subsets_of(every)):
        others = {"window_size": 3} if i % 2 else {"scale": 0.3}
        sizes = STEP_SIZES | {"offsets": (0, 2, 2, 5)}
        register(add("+".join(given) or "bare", given, sizes, (COMBINATION,), **others))


PREFILL_SIZES = {"B": 2, "T": 13, "TK": 37, "H": 3, "HQ": 6, "K": 10, "V": 7}
OLDER = (3, 0, 9, 4, 5)  # keys of each sequence before those of its queries' steps
PREFILL_OPTIONAL = ("g", "sink_bias", "cu_seqlens", "decay")


def packed(offsets: tuple[int, ...], older: tuple[int, ...] = OLDER) -> dict[str, Any]:
    """Sizes of packed queries, and of keys that each sequence has beside theirs."""
    sizes = {"B": 1, "offsets": offsets, "older": older}
    return sizes | {"TK": key_offsets(sizes)[-1]}


def key_offsets(sizes: Mapping[str, Any]) -> list[int]:
    """Offsets of the keys, from those of the queries."""
    found, older = [0], sizes["older"]
    for n, (start, end) in enumerate(pairwise(sizes["offsets"])):
        found.append(found[-1] + max(0, end - start + older[n % len(older)]))
    return found


def prefill_inputs(
    draw: Draw, sizes: Mapping[str, Any], given: tuple[str, ...] = (), wide: bool = True, **arguments: Any
) -> Inputs:
    """q, longer k and v, and the optional tensors in `given`; a callable argument changes its tensor."""
    heads, query_heads, key, value = (sizes[letter] for letter in ("H", "HQ", "K", "V"))
    batch, time, count = sizes.get("B"), sizes.get("T"), sizes["TK"]
    if "cu_seqlens" in given:
        offsets = key_offsets(sizes)
        batch, time, count = 1, sizes["offsets"][-1], offsets[-1]
    beside = draw.wide if wide else draw.dtype
    built: Inputs = {
        "q": draw.normal("q", (batch, time, query_heads, key)),
        "k": draw.normal("k", (batch, count, heads, key)),
        "v": draw.normal("v", (batch, count, heads, value)),
    }
    if "g" in given:
        built["g"] = draw.decay("g", (batch, count, query_heads), dtype=beside)
    if "decay" in given:
        built["decay"] = draw.decay("decay", (batch, time, query_heads), -5.0, dtype=beside)
    if "sink_bias" in given:
        built["sink_bias"] = draw.normal("sink_bias", (query_heads,), dtype=beside)
    if "cu_seqlens" in given:
        built |= {"cu_seqlens": draw.integers(sizes["offsets"]), "cu_seqlens_k": draw.integers(offsets)}
    for name, x in arguments.items():
        built[name] = x(built[name]) if callable(x) else x
    return built


def prefill_case(
    reason: str, given: tuple[str, ...], sizes: Mapping[str, Any], tags: tuple[str, ...] = (), **arguments: Any
) -> Case:
    """A case of the rectangular form."""
    return Case(
        id=reason,
        operator="attn_prefill",
        build=partial(prefill_inputs, given=given, **arguments),
        sizes=sizes,
        reference=reference.prefill,
        outputs=("o", "lse"),
        differentiable=(*DIFFERENTIABLE, "decay"),
        tags=frozenset(tags),
    )


def register_prefill() -> None:
    """Queries of the last steps, and of steps past all keys."""
    add, sizes = prefill_case, PREFILL_SIZES
    most = ("g", "sink_bias")
    after = {"gap": 5}
    pack = sizes | packed((0, 0, 1, 9, 9, 22))
    strided_inputs = dict.fromkeys(("q", "k", "v", "g", "decay", "sink_bias"), strided)
    register(
        add("everything", (*most, "decay"), sizes, (INDUCTOR, EXPORT, SMALL), window_size=61, scale=0.3, **after),
        add("last-steps", most, sizes, (INDUCTOR, SMALL), window_size=23, scale=0.3),
        add("plain", (), sizes),
        add("as-many-queries-as-keys", ("g",), sizes | {"T": 37}),
        add("one-query", most, sizes | {"T": 1}, (SMALL,)),
        add("no-queries", most, sizes | {"T": 0}),
        add("no-keys", (*most, "decay"), sizes | {"TK": 0}, **after),
        add("more-queries-than-keys", most, sizes | {"TK": 7}, (SMALL,)),
        add("past-all-keys", ("g",), sizes, (SMALL,), **after),
        add("capped", most, sizes, (SMALL,), softcap=2.0),
        add("capped-past-all-keys", ("g", "decay"), sizes, softcap=2.0, **after),
        add("strong-decay", most, sizes, (SMALL,), g=resets),
        add("strong-decay-past-all-keys", (*most, "decay"), sizes, g=resets, **after),
        add("window-of-one", most, sizes, window_size=1),
        add("window-of-none", most, sizes, window_size=0),
        add("window-that-ends-in-the-gap", most, sizes, (SMALL,), window_size=9, **after),
        add("large-scores", ("g",), sizes, q=large_scores),
        add("largest-score-first", most, sizes, (SMALL,), k=rising_scores, gap=0),
        add("packed", ("cu_seqlens", *most), pack, (INDUCTOR, SMALL), window_size=11, softcap=3.0),
        add("packed-past-all-keys", ("cu_seqlens", *most, "decay"), pack, (SMALL,), window_size=17, **after),
        add("packed-int32-offsets", ("cu_seqlens",), pack, cu_seqlens=Tensor.int, cu_seqlens_k=Tensor.int),
        add("packed-more-queries-than-keys", ("cu_seqlens", *most), sizes | packed((0, 5, 5, 13), (-3, 4, -8))),
        add("not-contiguous", (*most, "decay"), sizes, (SMALL,), **strided_inputs, **after),
        add("gates-and-sinks-in-the-activations-dtype", (*most, "decay"), sizes, wide=False, **after),
        add("one-key-head", most, sizes | {"B": 1, "H": 1, "HQ": 5}, (SMALL,)),
        add("widths-past-a-tile", most, sizes | {"K": 20, "V": 33}, (SMALL,)),
    )
    for i, given in enumerate(subsets_of(PREFILL_OPTIONAL)):
        others: dict[str, Any] = {"gap": 2} if "decay" in given or i % 2 else {}
        others |= {"window_size": 6} if i % 3 == 0 else {}
        others |= {"softcap": 2.0} if i % 3 == 1 else {}
        tiny = sizes | {"T": 3, "TK": 7, "K": 9}
        tiny |= packed((0, 2, 2, 3, 5), (2, 3, 1)) if "cu_seqlens" in given else {}
        register(prefill_case("+".join(given) or "bare", given, tiny, (COMBINATION,), **others))


for form in FORMS:
    register_scenarios(form)
    register_combinations(form)
register_steps()
register_prefill()
