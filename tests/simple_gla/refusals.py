"""Calls of simple_gla that must be refused, and how. Each changes a call that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.cases import Case, Refusal, cases
from tests.cases_simple_gla import FORMS

Rows = list[tuple[str, Case, dict[str, Any], type[Exception], str]]

GATED = "several-chunks-ragged-tail"
FLOATING = "must be float64, float32, bfloat16 or float16, got int32"
INTEGRAL = "must be int32 or int64, got float32"


def by_id(operator: str) -> dict[str, Case]:
    """The cases of an operator by their ids."""
    return {case.id: case for case in cases(operator)}


def to_meta(x: Tensor) -> Tensor:
    """On another device."""
    return x.to("meta")


def offsets(*values: int) -> Callable[[Tensor], Tensor]:
    """Other values, of the old dtype."""
    return lambda old: torch.tensor(values, dtype=old.dtype)


def of_activations(gated: Case) -> Rows:
    """q, k and v of wrong shapes, dtypes and devices."""
    value, kind = ValueError, TypeError
    return [
        ("q-without-batch", gated, {"q": lambda x: x[0]}, value, r"q must be \[B, T, HK, K\], got \(37, 3, 10\)"),
        ("q-of-no-width", gated, {"q": lambda x: x[..., :0]}, value, r"q must have K >= 1, got K = 0"),
        ("v-of-no-width", gated, {"v": lambda x: x[..., :0]}, value, r"v must have V >= 1, got V = 0"),
        ("v-without-heads", gated, {"v": lambda x: x[:, :, 0]}, value, r"v must be \[B, T, H, V\], got \(2, 37, 7\)"),
        (
            "k-shorter",
            gated,
            {"k": lambda x: x[:, 1:]},
            value,
            r"k must be .* = \(2, 37, 3, 10\), got \(2, 36, 3, 10\)",
        ),
        (
            "k-narrower",
            gated,
            {"k": lambda x: x[..., 1:]},
            value,
            r"k must be \[B, T, HK, K\] = .*, got \(2, 37, 3, 9\)",
        ),
        ("k-with-v-heads", gated, {"k": lambda x: x.repeat(1, 1, 2, 1)}, value, r"k must be .*got \(2, 37, 6, 10\)"),
        ("v-shorter", gated, {"v": lambda x: x[:, 1:]}, value, r"v must be .* = \(2, 37, 6, 7\), got \(2, 36, 6, 7\)"),
        ("v-of-another-batch", gated, {"v": lambda x: x[:1]}, value, r"v must be \[B, T, H, V\] .*got \(1, 37, 6, 7\)"),
        (
            "heads-that-do-not-divide",
            gated,
            {"v": lambda x: x[:, :, :5], "g": None},
            value,
            r"v must have a multiple of the 3 heads of q and k, got 5 heads",
        ),
        ("q-of-another-dtype", gated, {"q": Tensor.double}, kind, r"q, k, v must share one of .*got float64, float32"),
        ("k-of-another-dtype", gated, {"k": Tensor.half}, kind, r"q, k, v must share one of .*got float32, float16"),
        ("v-of-another-dtype", gated, {"v": Tensor.bfloat16}, kind, r"q, k, v must share .*float32, float32, bfloat16"),
        (
            "integer-activations",
            gated,
            dict.fromkeys(("q", "k", "v"), Tensor.int),
            kind,
            r"q, k, v must share one of float64, float32, bfloat16, float16, got int32, int32, int32",
        ),
        ("q-elsewhere", gated, {"q": to_meta}, value, r"must be on meta like q, got cpu"),
        ("k-elsewhere", gated, {"k": to_meta}, value, r"k must be on cpu like q, got meta"),
        ("v-elsewhere", gated, {"v": to_meta}, value, r"v must be on cpu like q, got meta"),
    ]


def of_decays(gated: Case, constant: Case) -> Rows:
    """g and g_gamma, and both."""
    value, kind, floating = ValueError, TypeError, FLOATING
    return [
        ("g-per-key-head", gated, {"g": lambda x: x[..., :3]}, value, r"g must be \[B, T, H\] = \(2, 37, 6\), got"),
        ("g-heads-first", gated, {"g": lambda x: x.mT}, value, r"g must be \[B, T, H\] = .*, got \(2, 6, 37\)"),
        ("g-per-channel", gated, {"g": lambda x: x[..., None]}, value, r"g must be .*, got \(2, 37, 6, 1\)"),
        (
            "g_gamma-per-key-head",
            constant,
            {"g_gamma": lambda x: x[:3]},
            value,
            r"g_gamma must be \[H\] = \(6,?\), got",
        ),
        (
            "both-decays",
            gated,
            {"g_gamma": torch.zeros(6)},
            value,
            r"give at most one of g and g_gamma, got g and g_gamma",
        ),
        ("integer-g", gated, {"g": Tensor.int}, kind, f"g {floating}"),
        ("integer-g_gamma", constant, {"g_gamma": Tensor.int}, kind, f"g_gamma {floating}"),
        ("g-elsewhere", gated, {"g": to_meta}, value, r"g must be on cpu like q, got meta"),
        ("g_gamma-elsewhere", constant, {"g_gamma": to_meta}, value, r"g_gamma must be on cpu like q, got meta"),
    ]


def of_packing(gated: Case, packed: Case) -> Rows:
    """cu_seqlens and cu_seqlens_cpu: what is known without reading them, and their values."""
    value, kind, integral = ValueError, TypeError, INTEGRAL
    return [
        ("offsets-elsewhere", packed, {"cu_seqlens": to_meta}, value, r"cu_seqlens must be on cpu like q, got meta"),
        ("host-offsets-elsewhere", packed, {"cu_seqlens_cpu": to_meta}, value, r"cu_seqlens_cpu must be on cpu"),
        ("float-offsets", packed, {"cu_seqlens": Tensor.float}, kind, f"cu_seqlens {integral}"),
        ("float-host-offsets", packed, {"cu_seqlens_cpu": Tensor.float}, kind, f"cu_seqlens_cpu {integral}"),
        (
            "offsets-as-a-matrix",
            packed,
            {"cu_seqlens": lambda x: x[None]},
            value,
            r"cu_seqlens must be \[N \+ 1\], got",
        ),
        (
            "offsets-of-no-sequence",
            packed,
            {"cu_seqlens": lambda x: x[:1]},
            value,
            r"cu_seqlens must be .* N >= 1, got",
        ),
        (
            "host-offsets-of-other-length",
            packed,
            {"cu_seqlens_cpu": lambda x: x[1:]},
            value,
            r"cu_seqlens_cpu must be \[N \+ 1\] = \(6,\) like cu_seqlens, got \(5\)",
        ),
        (
            "host-offsets-alone",
            packed,
            {"cu_seqlens": None},
            value,
            r"cu_seqlens_cpu was given without cu_seqlens",
        ),
        (
            "offsets-beside-a-batch",
            gated,
            {"cu_seqlens": torch.tensor([0, 5, 37]), "initial_state": None},
            value,
            r"packed sequences \(cu_seqlens\) need batch B = 1, got B = 2",
        ),
        ("offsets-from-1", packed, {"cu_seqlens": offsets(1, 1, 2, 3, 4, 37)}, value, r"must start at 0, got 1"),
        ("offsets-past-T", packed, {"cu_seqlens": offsets(0, 1, 2, 3, 4, 38)}, value, r"must end at T = 37, got 38"),
        ("offsets-short-of-T", packed, {"cu_seqlens": offsets(0, 1, 2, 3, 4, 36)}, value, r"end at T = 37, got 36"),
        (
            "offsets-that-fall",
            packed,
            {"cu_seqlens": offsets(0, 9, 8, 20, 21, 37)},
            value,
            r"cu_seqlens must never fall, got 9 then 8 at position 1",
        ),
    ]


def of_state(gated: Case, packed: Case) -> Rows:
    """initial_state, and the order of its widths."""
    value, kind, floating = ValueError, TypeError, FLOATING
    return [
        (
            "state-of-another-batch",
            gated,
            {"initial_state": lambda x: x[:1]},
            value,
            r"initial_state must be \[N, H, K, V\] = \(2, 6, 10, 7\), got \(1, 6, 10, 7\)",
        ),
        (
            "state-of-another-count-in-a-pack",
            packed,
            {"initial_state": lambda x: x[:1]},
            value,
            r"initial_state must be \[N, H, K, V\] = \(5, 6, 10, 7\), got \(1, 6, 10, 7\)",
        ),
        (
            "state-key-first-said-to-be-value-first",
            gated,
            {"state_v_first": True},
            value,
            r"initial_state must be \[N, H, V, K\] \(state_v_first=True\) = \(2, 6, 7, 10\), got \(2, 6, 10, 7\)",
        ),
        (
            "state-value-first-said-to-be-key-first",
            gated,
            {"initial_state": lambda x: x.mT},
            value,
            r"initial_state must be \[N, H, K, V\] = \(2, 6, 10, 7\), got \(2, 6, 7, 10\)",
        ),
        ("integer-state", gated, {"initial_state": Tensor.int}, kind, f"initial_state {floating}"),
        ("state-elsewhere", gated, {"initial_state": to_meta}, value, r"initial_state must be on cpu like q, got meta"),
    ]


def of_chunk_size(gated: Case) -> Rows:
    """What is no power of two, or too small or too large."""
    value = ValueError
    return [
        *[
            (f"chunk-of-{n}", gated, {"chunk_size": n}, value, rf"chunk_size must be .* from 16 to 256, got {n}")
            for n in (0, 8, 48, 512)
        ],
    ]


def of_form(form: str) -> list[Refusal]:
    """What a form refuses, of the arguments that it takes."""
    found = by_id(form)
    gated, constant, packed = (found[i] for i in (GATED, "constant-decay", "packed-int32-offsets"))
    taken = {argument.name for argument in gated.overload._schema.arguments}
    rows = [*of_activations(gated), *of_decays(gated, constant), *of_packing(gated, packed)]
    if "initial_state" in taken:
        rows += of_state(gated, found["packed-with-empty-and-one-step"])
    if "chunk_size" in taken:
        rows += of_chunk_size(gated)
    return [
        Refusal(reason, case, {name: x for name, x in change.items() if name in taken}, error, message)
        for reason, case, change, error, message in rows
    ]


def of_dispatcher() -> list[Refusal]:
    """A named form is used or refused, with the reason."""
    gated = by_id("simple_gla")[GATED]
    refused = NotImplementedError
    backwards, state = r"reverse=True runs time backwards", r"the quadratic form has no state"
    return [
        Refusal("mode-unknown", gated, {"mode": "fast"}, ValueError, r"mode must be auto, chunk, .*, got 'fast'"),
        Refusal("chunk-reversed", gated, {"mode": "chunk", "reverse": True}, refused, f"mode='chunk': {backwards}"),
        Refusal("fused-reversed", gated, {"mode": "fused_chunk", "reverse": True}, refused, backwards),
        Refusal("parallel-with-state", gated, {"mode": "parallel"}, refused, f"mode='parallel': {state}"),
        Refusal(
            "parallel-reversed-with-state",
            gated,
            {"mode": "parallel", "reverse": True},
            refused,
            f"{backwards}.*; {state}",
        ),
    ]


def of_step() -> list[Refusal]:
    """What the decode step refuses."""
    found = by_id("simple_gla_step_")
    pool, constant = found["pool-with-padding"], found["constant-decay"]
    value, kind = ValueError, TypeError
    rows: Rows = [
        ("q-with-a-time-axis", pool, {"q": lambda x: x[:, None]}, value, r"q must be \[N, HK, K\], got \(4, 1, 3, 5\)"),
        ("q-of-no-width", pool, {"q": lambda x: x[..., :0]}, value, r"q must have K >= 1, got K = 0"),
        (
            "k-narrower",
            pool,
            {"k": lambda x: x[..., 1:]},
            value,
            r"k must be \[N, HK, K\] = \(4, 3, 5\), got \(4, 3, 4\)",
        ),
        ("v-of-another-batch", pool, {"v": lambda x: x[1:]}, value, r"v must be \[N, H, V\] = .*, got \(3, 6, 7\)"),
        (
            "heads-that-do-not-divide",
            pool,
            {"v": lambda x: x[:, :5], "g": None},
            value,
            r"v must have a multiple of the 3 heads of q and k, got 5 heads",
        ),
        ("g-with-a-time-axis", pool, {"g": lambda x: x[:, None]}, value, r"g must be \[N, H\] = \(4, 6\), got"),
        (
            "g_gamma-per-key-head",
            constant,
            {"g_gamma": lambda x: x[:3]},
            value,
            r"g_gamma must be \[H\] = \(6,?\), got",
        ),
        ("both-decays", pool, {"g_gamma": torch.zeros(6)}, value, r"give at most one of g and g_gamma"),
        (
            "pool-of-other-widths",
            pool,
            {"state": lambda x: x.mT},
            value,
            r"state must be \[P, H, K, V\] = \(9, 6, 5, 7\)",
        ),
        ("pool-of-one-row", pool, {"state": lambda x: x[0]}, value, r"state must be \[P, H, K, V\], got \(6, 5, 7\)"),
        ("pool-larger-than-N", pool, {"slots": None}, value, r"state must be \[N, H, K, V\] \(without slots\) = \(4, "),
        (
            "slots-of-another-count",
            pool,
            {"slots": lambda x: x[1:]},
            value,
            r"slots must be \[N\] = \(4,?\), got \(3\)",
        ),
        ("float-slots", pool, {"slots": Tensor.float}, kind, r"slots must be int32 or int64, got .*float32"),
        ("slot-past-the-pool", pool, {"slots": offsets(0, 1, 9, 2)}, value, r"slots must be .* P = 9, got 9"),
        ("slot-below-padding", pool, {"slots": offsets(0, 1, -2, 2)}, value, r"slots must be -1 or in .*, got -2"),
        ("slot-twice", pool, {"slots": offsets(3, -1, -1, 3)}, value, r"slots must differ .* got \[3, -1, -1, 3\]"),
        ("q-of-another-dtype", pool, {"q": Tensor.half}, kind, r"q, k, v must share one of .*got float16, float32"),
        ("k-of-another-dtype", pool, {"k": Tensor.half}, kind, r"q, k, v must share one of .*got float32, float16"),
        ("v-of-another-dtype", pool, {"v": Tensor.half}, kind, r"q, k, v must share .*got float32, float32, float16"),
        ("integer-g", pool, {"g": Tensor.int}, kind, r"g must be float64, .* got int32"),
        ("integer-g_gamma", constant, {"g_gamma": Tensor.int}, kind, r"g_gamma must be float64, .* got int32"),
        ("integer-pool", pool, {"state": Tensor.int}, kind, r"state must be float32, bfloat16 or float16, got .*int32"),
        ("float64-pool", pool, {"state": Tensor.double}, kind, r"state must be float32, bfloat16 or float16, got .*64"),
        ("q-elsewhere", pool, {"q": to_meta}, value, r"must be on meta like q, got cpu"),
        *[
            (f"{name}-elsewhere", case, {name: to_meta}, value, rf"{name} must be on cpu like q, got meta")
            for case, names in ((pool, ("k", "v", "state", "g", "slots")), (constant, ("g_gamma",)))
            for name in names
        ],
    ]
    return [Refusal(*row) for row in rows]


REFUSALS = [*(r for form in FORMS for r in of_form(form)), *of_dispatcher(), *of_step()]
