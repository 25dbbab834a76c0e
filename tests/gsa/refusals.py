"""Calls of gsa that must be refused, and how. Each changes a call that works."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cases import Case, Refusal
from tests.cases_gsa import FORMS
from tests.refusals_simple_gla import by_id, offsets, to_meta

Row = tuple[str, Case, dict[str, Any], type[Exception], str]
FLOATING = r"must be float64, float32, bfloat16 or float16, got int32"
INTEGRAL = r"must be int32 or int64, got float32"


def of_shapes(gated: Case) -> list[Row]:
    """What every form refuses about shapes."""
    value = ValueError
    return [
        ("q-without-batch", gated, {"q": lambda x: x[0]}, value, r"q must be \[B, T, HQ, K\], got \(37, 6, 10\)"),
        ("q-of-no-width", gated, {"q": lambda x: x[..., :0]}, value, r"q must have K >= 1, got K = 0"),
        ("v-of-no-width", gated, {"v": lambda x: x[..., :0]}, value, r"v must have V >= 1, got V = 0"),
        ("no-slots", gated, {"s": lambda x: x[..., :0]}, value, r"s must have M >= 1, got M = 0"),
        ("v-without-heads", gated, {"v": lambda x: x[:, :, 0]}, value, r"v must be \[B, T, H, V\], got \(2, 37, 7\)"),
        (
            "k-shorter",
            gated,
            {"k": lambda x: x[:, 1:]},
            value,
            r"k must be .* = \(2, 37, 3, 10\), got \(2, 36, 3, 10\)",
        ),
        ("k-with-q-heads", gated, {"k": lambda x: x.repeat(1, 1, 2, 1)}, value, r"k must be .*got \(2, 37, 6, 10\)"),
        ("v-shorter", gated, {"v": lambda x: x[:, 1:]}, value, r"v must be .* = \(2, 37, 3, 7\), got \(2, 36, 3, 7\)"),
        (
            "heads-that-do-not-divide",
            gated,
            {"q": lambda x: x[:, :, :5]},
            value,
            r"q must have a multiple of the 3 heads of k, v, s and g, got 5 heads",
        ),
        ("s-per-query-head", gated, {"s": lambda x: x.repeat(1, 1, 2, 1)}, value, r"s must be .*got \(2, 37, 6, 5\)"),
        ("g-per-head", gated, {"g": lambda x: x[..., 0]}, value, r"g must be \[B, T, H, M\] = .*got \(2, 37, 3\)"),
        ("g-heads-first", gated, {"g": lambda x: x.transpose(1, 2)}, value, r"g must be .*, got \(2, 3, 37, 5\)"),
        (
            "keys-state-of-another-batch",
            gated,
            {"initial_k": lambda x: x[:1]},
            value,
            r"initial_k must be \[N, H, K, M\] .* = \(2, 3, 10, 5\), got \(1, 3, 10, 5\)",
        ),
        (
            "values-state-the-other-way-round",
            gated,
            {"initial_v": lambda x: x.mT},
            value,
            r"initial_v must be \[N, H, M, V\] .* = \(2, 3, 5, 7\), got \(2, 3, 7, 5\)",
        ),
        (
            "offsets-beside-a-batch",
            gated,
            {"cu_seqlens": torch.tensor([0, 5, 37]), "initial_k": None, "initial_v": None},
            value,
            r"packed sequences \(cu_seqlens\) need batch B = 1, got B = 2",
        ),
    ]


def of_offsets(packed: Case) -> list[Row]:
    """What every form refuses about packed sequences."""
    value = ValueError
    return [
        ("offsets-elsewhere", packed, {"cu_seqlens": to_meta}, value, r"cu_seqlens must be on cpu like q, got meta"),
        ("host-offsets-elsewhere", packed, {"cu_seqlens_cpu": to_meta}, value, r"cu_seqlens_cpu must be on cpu"),
        ("float-offsets", packed, {"cu_seqlens": Tensor.float}, TypeError, f"cu_seqlens {INTEGRAL}"),
        ("float-host-offsets", packed, {"cu_seqlens_cpu": Tensor.float}, TypeError, f"cu_seqlens_cpu {INTEGRAL}"),
        ("offsets-as-a-matrix", packed, {"cu_seqlens": lambda x: x[None]}, value, r"cu_seqlens must be \[N \+ 1\]"),
        (
            "host-offsets-of-other-length",
            packed,
            {"cu_seqlens_cpu": lambda x: x[1:]},
            value,
            r"cu_seqlens_cpu must be \[N \+ 1\] = \(6,\) like cu_seqlens, got \(5\)",
        ),
        ("host-offsets-alone", packed, {"cu_seqlens": None}, value, r"cu_seqlens_cpu was given without cu_seqlens"),
        ("offsets-past-T", packed, {"cu_seqlens": offsets(0, 1, 2, 3, 4, 38)}, value, r"must end at T = 37, got 38"),
        (
            "offsets-that-fall",
            packed,
            {"cu_seqlens": offsets(0, 9, 8, 20, 21, 37)},
            value,
            r"cu_seqlens must never fall, got 9 then 8 at position 1",
        ),
    ]


def of_form(form: str) -> list[Refusal]:
    """What every form refuses; rows about arguments that a form does not take are left out."""
    found = by_id(form)
    gated, packed = found["several-chunks-ragged-tail"], found["packed-int32-offsets"]
    kind, value = TypeError, ValueError
    rows: list[Row] = [
        *of_shapes(gated),
        *of_offsets(packed),
        ("q-of-another-dtype", gated, {"q": Tensor.double}, kind, r"q, k, v must share one of .*got float64, float32"),
        ("k-of-another-dtype", gated, {"k": Tensor.half}, kind, r"q, k, v must share one of .*got float32, float16"),
        ("v-of-another-dtype", gated, {"v": Tensor.bfloat16}, kind, r"q, k, v must share .*float32, float32, bfloat16"),
        *[
            (f"integer-{name}", gated, {name: Tensor.int}, kind, f"{name} {FLOATING}")
            for name in ("s", "g", "initial_k", "initial_v")
        ],
        ("q-elsewhere", gated, {"q": to_meta}, value, r"must be on meta like q, got cpu"),
        *[
            (f"{name}-elsewhere", gated, {name: to_meta}, value, f"{name} must be on cpu like q, got meta")
            for name in ("k", "v", "s", "g", "initial_k", "initial_v")
        ],
        *[
            (f"chunk-of-{n}", gated, {"chunk_size": n}, value, rf"chunk_size must be .* from 16 to 256, got {n}")
            for n in (0, 48, 512)
        ],
        ("level-of-3", gated, {"checkpoint_level": 3}, value, r"checkpoint_level must be 0, 1 or 2, got 3"),
    ]
    taken = {argument.name for argument in gated.overload._schema.arguments}
    return [Refusal(*row) for row in rows if set(row[2]) <= taken]


def of_dispatcher() -> list[Refusal]:
    """A named form is used or refused, with the reason."""
    gated = by_id("gsa")["several-chunks-ragged-tail"]
    backwards = r"mode='chunk': reverse=True runs time backwards"
    return [
        Refusal("mode-unknown", gated, {"mode": "fast"}, ValueError, r"mode must be auto, chunk, .*, got 'fast'"),
        Refusal("chunk-reversed", gated, {"mode": "chunk", "reverse": True}, NotImplementedError, backwards),
    ]


def of_step() -> list[Refusal]:
    """What the decode step refuses."""
    pool = by_id("gsa_step_")["pool-with-padding"]
    value, kind = ValueError, TypeError
    pools = ("state_k", "state_v")
    rows: list[Row] = [
        ("q-with-a-time-axis", pool, {"q": lambda x: x[:, None]}, value, r"q must be \[N, HQ, K\], got \(4, 1, 6, 5\)"),
        ("k-narrower", pool, {"k": lambda x: x[..., 1:]}, value, r"k must be .* = \(4, 3, 5\), got \(4, 3, 4\)"),
        ("v-of-another-batch", pool, {"v": lambda x: x[1:]}, value, r"[vk] must be \[N, H, [KV]\] = .*, got"),
        ("heads-that-do-not-divide", pool, {"q": lambda x: x[:, :5]}, value, r"q must have a multiple of the 3 heads"),
        ("s-with-a-time-axis", pool, {"s": lambda x: x[:, None]}, value, r"s must be \[N, H, M\], got"),
        ("g-with-a-time-axis", pool, {"g": lambda x: x[:, None]}, value, r"g must be \[N, H, M\] = \(4, 3, 8\), got"),
        ("keys-of-other-widths", pool, {"state_k": lambda x: x.mT}, value, r"state_k must be .* = \(9, 3, 5, 8\)"),
        ("values-of-other-widths", pool, {"state_v": lambda x: x.mT}, value, r"state_v must be .* = \(9, 3, 8, 7\)"),
        ("pools-of-two-sizes", pool, {"state_v": lambda x: x[1:]}, value, r"state_v must be .* got \(8, 3, 8, 7\)"),
        ("pool-larger-than-N", pool, {"slots": None}, value, r"state_k must be \[N, H, K, M\] .* = \(4, "),
        (
            "slots-of-another-count",
            pool,
            {"slots": lambda x: x[1:]},
            value,
            r"slots must be \[N\] = \(4,?\), got \(3\)",
        ),
        ("float-slots", pool, {"slots": Tensor.float}, kind, r"slots must be int32 or int64, got .*float32"),
        ("slot-past-the-pool", pool, {"slots": offsets(0, 1, 9, 2)}, value, r"slots must be .* P = 9, got 9"),
        ("slot-twice", pool, {"slots": offsets(3, -1, -1, 3)}, value, r"slots must differ .* got \[3, -1, -1, 3\]"),
        ("q-of-another-dtype", pool, {"q": Tensor.half}, kind, r"q, k, v must share one of .*got float16, float32"),
        ("k-of-another-dtype", pool, {"k": Tensor.half}, kind, r"q, k, v must share one of .*got float32, float16"),
        ("v-of-another-dtype", pool, {"v": Tensor.half}, kind, r"q, k, v must share .*float32, float32, float16"),
        *[(f"integer-{name}", pool, {name: Tensor.int}, kind, f"{name} {FLOATING}") for name in ("s", "g")],
        *[
            (
                f"{dtype}-{name}",
                pool,
                {name: change},
                kind,
                rf"{name} must be float32, bfloat16 or float16, got .*{dtype}",
            )
            for name in pools
            for dtype, change in (("int32", Tensor.int), ("float64", Tensor.double))
        ],
        ("q-elsewhere", pool, {"q": to_meta}, value, r"must be on meta like q, got cpu"),
        *[
            (f"{name}-elsewhere", pool, {name: to_meta}, value, f"{name} must be on cpu like q, got meta")
            for name in ("k", "v", "s", "g", *pools, "slots")
        ],
    ]
    return [Refusal(*row) for row in rows]


REFUSALS = [*(r for form in FORMS for r in of_form(form)), *of_dispatcher(), *of_step()]
