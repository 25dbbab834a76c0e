"""Calls of linear_attn and its normalisation that must be refused, and how. Each changes a call that works."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.cases import Case, Refusal
from tests.cases_linear_attn import FORMS
from tests.refusals_simple_gla import by_id, offsets, to_meta

Row = tuple[str, Case, dict[str, Any], type[Exception], str]

FLOATING = r"must be float64, float32, bfloat16 or float16, got int32"
INTEGRAL = r"must be int32 or int64, got float32"


def of_activations(case: Case, values: str) -> list[Row]:
    """q [2, 37, 3, 10], k and `values` [2, 37, 6, 7] of a wrong shape, dtype or device."""
    value, kind, shared = ValueError, TypeError, rf"q, k, {values} must share one of"
    return [
        ("q-without-batch", case, {"q": lambda x: x[0]}, value, r"q must be \[B, T, HK, K\], got \(37, 3, 10\)"),
        ("q-of-no-width", case, {"q": lambda x: x[..., :0]}, value, r"q must have K >= 1, got K = 0"),
        ("k-shorter", case, {"k": lambda x: x[:, 1:]}, value, r"k must be .* = \(2, 37, 3, 10\), got \(2, 36, 3, 10\)"),
        ("k-narrower", case, {"k": lambda x: x[..., 1:]}, value, r"k must be \[B, T, HK, K\] .*, got \(2, 37, 3, 9\)"),
        ("k-with-v-heads", case, {"k": lambda x: x.repeat(1, 1, 2, 1)}, value, r"k must be .*got \(2, 37, 6, 10\)"),
        (
            f"{values}-shorter",
            case,
            {values: lambda x: x[:, 1:]},
            value,
            rf"{values} must be .* = \(2, 37, 6, 7\), got \(2, 36, 6, 7\)",
        ),
        (
            "heads-that-do-not-divide",
            case,
            {values: lambda x: x[:, :, :5]},
            value,
            rf"{values} must have a multiple of the 3 heads of q and k, got 5 heads",
        ),
        ("q-of-another-dtype", case, {"q": Tensor.double}, kind, rf"{shared} .*got float64, float32"),
        ("k-of-another-dtype", case, {"k": Tensor.half}, kind, rf"{shared} .*got float32, float16"),
        (f"{values}-of-another-dtype", case, {values: Tensor.half}, kind, rf"{shared} .*float32, float16"),
        ("integer-activations", case, dict.fromkeys(("q", "k", values), Tensor.int), kind, rf"{shared} .*got int32"),
        ("q-elsewhere", case, {"q": to_meta}, value, r"must be on meta like q, got cpu"),
        ("k-elsewhere", case, {"k": to_meta}, value, r"k must be on cpu like q, got meta"),
        (f"{values}-elsewhere", case, {values: to_meta}, value, rf"{values} must be on cpu like q, got meta"),
    ]


def of_packs(case: Case, lone: Case) -> list[Row]:
    """cu_seqlens and cu_seqlens_cpu of five sequences over 37 steps; `lone` gives cu_seqlens alone."""
    value, kind = ValueError, TypeError
    return [
        ("offsets-elsewhere", case, {"cu_seqlens": to_meta}, value, r"cu_seqlens must be on cpu like q, got meta"),
        ("host-offsets-elsewhere", case, {"cu_seqlens_cpu": to_meta}, value, r"cu_seqlens_cpu must be on cpu"),
        ("float-offsets", case, {"cu_seqlens": Tensor.float}, kind, f"cu_seqlens {INTEGRAL}"),
        ("float-host-offsets", case, {"cu_seqlens_cpu": Tensor.float}, kind, f"cu_seqlens_cpu {INTEGRAL}"),
        ("offsets-as-a-matrix", lone, {"cu_seqlens": lambda x: x[None]}, value, r"cu_seqlens must be \[N \+ 1\], got"),
        (
            "host-offsets-of-other-length",
            case,
            {"cu_seqlens_cpu": lambda x: x[1:]},
            value,
            r"cu_seqlens_cpu must be \[N \+ 1\] = \(6,\) like cu_seqlens, got \(5\)",
        ),
        ("host-offsets-alone", case, {"cu_seqlens": None}, value, r"cu_seqlens_cpu was given without cu_seqlens"),
    ]


def of_values(case: Case, last: int) -> list[Row]:
    """Offsets of five sequences whose values are wrong."""
    wrong = ValueError
    return [
        ("offsets-from-1", case, {"cu_seqlens": offsets(1, 1, 2, 3, 4, last)}, wrong, r"must start at 0, got 1"),
        ("offsets-past-T", case, {"cu_seqlens": offsets(0, 1, 2, 3, 4, last + 1)}, wrong, rf"must end at T = {last}"),
        ("offsets-that-fall", case, {"cu_seqlens": offsets(0, 9, 8, 20, 21, last)}, wrong, r"must never fall, got 9"),
    ]


def of_form(form: str) -> list[Refusal]:
    """What every form refuses."""
    found = by_id(form)
    case, packed = found["several-chunks-ragged-tail"], found["packed-int32-offsets"]
    value, kind = ValueError, TypeError
    rows: list[Row] = [
        *of_activations(case, "v"),
        *of_packs(packed, found["packed-with-empty-and-one-step"]),
        *of_values(packed, 37),
        ("kv-without-z", case, {"initial_z": None}, value, r"initial_state must be a pair .*got no initial_z"),
        ("z-without-kv", case, {"initial_state": None}, value, r"initial_state must be a pair .*got initial_z alone"),
        ("pair-not-normalised", case, {"normalize": False}, value, r"with normalize=False, .* kv .* got a pair"),
        (
            "kv-value-first",
            case,
            {"initial_state": lambda x: x.mT},
            value,
            r"initial_state must be \[N, H, K, V\] = \(2, 6, 10, 7\), got \(2, 6, 7, 10\)",
        ),
        (
            "z-without-its-axis-of-1",
            case,
            {"initial_z": lambda x: x[:, 0]},
            value,
            r"initial_z must be \[N, 1, H, K\] = \(2, 1, 6, 10\), got \(2, 6, 10\)",
        ),
        (
            "z-of-another-batch",
            case,
            {"initial_z": lambda x: x[:1]},
            value,
            r"initial_z must be \[N, 1, H, K\] = \(2, 1, 6, 10\), got \(1, 1, 6, 10\)",
        ),
        ("integer-kv", case, {"initial_state": Tensor.int}, kind, f"initial_state {FLOATING}"),
        ("integer-z", case, {"initial_z": Tensor.int}, kind, f"initial_z {FLOATING}"),
        ("kv-elsewhere", case, {"initial_state": to_meta}, value, r"initial_state must be on cpu like q, got meta"),
        ("z-elsewhere", case, {"initial_z": to_meta}, value, r"initial_z must be on cpu like q, got meta"),
    ]
    if form != "fused_recurrent_linear_attn":
        rows += [("chunk-of-48", case, {"chunk_size": 48}, value, r"chunk_size must be .* from 16 to 256, got 48")]
    return [Refusal(*row) for row in rows]


def of_dispatcher() -> list[Refusal]:
    """A named form is used or refused, with the reason."""
    bare, backwards = by_id("linear_attn")["several-chunks-ragged-tail"], r"reverse=True runs time backwards"
    refused = NotImplementedError
    return [
        Refusal("mode-unknown", bare, {"mode": "parallel"}, ValueError, r"mode must be auto, chunk, .*'parallel'"),
        Refusal("chunk-reversed", bare, {"mode": "chunk", "reverse": True}, refused, f"mode='chunk': {backwards}"),
        Refusal("fused-reversed", bare, {"mode": "fused_chunk", "reverse": True}, refused, backwards),
    ]


def of_normalize() -> list[Refusal]:
    """What the divide step refuses."""
    found = by_id("normalize_output")
    case, packed = found["ragged-tail"], found["cu_seqlens+cu_seqlens_cpu"]
    value, kind = ValueError, TypeError
    rows: list[Row] = [
        *of_activations(case, "o"),
        *of_values(found["packed-int32-offsets"], 200),
        ("offsets-elsewhere", packed, {"cu_seqlens": to_meta}, value, r"cu_seqlens must be on cpu like q, got meta"),
        ("host-offsets-elsewhere", packed, {"cu_seqlens_cpu": to_meta}, value, r"cu_seqlens_cpu must be on cpu"),
        ("float-offsets", packed, {"cu_seqlens": Tensor.float}, kind, f"cu_seqlens {INTEGRAL}"),
        ("float-host-offsets", packed, {"cu_seqlens_cpu": Tensor.float}, kind, f"cu_seqlens_cpu {INTEGRAL}"),
        ("offsets-as-a-matrix", packed, {"cu_seqlens": lambda x: x[None]}, value, r"cu_seqlens must be \[N \+ 1\]"),
        (
            "host-offsets-of-other-length",
            packed,
            {"cu_seqlens_cpu": lambda x: x[1:]},
            value,
            r"cu_seqlens_cpu must be \[N \+ 1\] = \(5,\) like cu_seqlens, got \(4\)",
        ),
        ("host-offsets-alone", packed, {"cu_seqlens": None}, value, r"cu_seqlens_cpu was given without cu_seqlens"),
        (
            "z-without-its-axis-of-1",
            case,
            {"initial_z": lambda x: x[:, 0]},
            value,
            r"initial_z must be \[N, 1, H, K\] = \(2, 1, 6, 10\), got \(2, 6, 10\)",
        ),
        (
            "z-per-key-head",
            case,
            {"initial_z": lambda x: x[:, :, :3]},
            value,
            r"initial_z must be .*got \(2, 1, 3, 10\)",
        ),
        ("integer-z", case, {"initial_z": Tensor.int}, kind, f"initial_z {FLOATING}"),
        ("z-elsewhere", case, {"initial_z": to_meta}, value, r"initial_z must be on cpu like q, got meta"),
    ]
    return [Refusal(*row) for row in rows]


def of_step() -> list[Refusal]:
    """What the decode step refuses; neither pool is touched."""
    pool = by_id("linear_attn_step_")["pool-with-padding"]
    value, kind, shared = ValueError, TypeError, r"q, k, v must share one of"
    rows: list[Row] = [
        ("q-with-a-time-axis", pool, {"q": lambda x: x[:, None]}, value, r"q must be \[N, HK, K\], got \(4, 1, 3, 5\)"),
        (
            "k-narrower",
            pool,
            {"k": lambda x: x[..., 1:]},
            value,
            r"k must be \[N, HK, K\] = \(4, 3, 5\), got \(4, 3, 4\)",
        ),
        ("v-of-another-batch", pool, {"v": lambda x: x[1:]}, value, r"v must be \[N, H, V\] = .*, got \(3, 6, 7\)"),
        ("kv-of-other-widths", pool, {"state": lambda x: x.mT}, value, r"state must be .* = \(9, 6, 5, 7\), got"),
        ("z-of-one-row", pool, {"z": lambda x: x[0]}, value, r"z must be \[P, 1, H, K\], got \(1, 6, 5\)"),
        (
            "z-per-key-head",
            pool,
            {"z": lambda x: x[:, :, :3]},
            value,
            r"z must be \[P, 1, H, K\] = \(9, 1, 6, 5\), got",
        ),
        ("pools-larger-than-N", pool, {"slots": None}, value, r"z must be \[N, 1, H, K\] \(without slots\)"),
        ("pools-of-two-sizes", pool, {"z": lambda x: x[:8]}, value, r"state must be .* = \(8, 6, 5, 7\), got \(9, "),
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
        ("q-of-another-dtype", pool, {"q": Tensor.half}, kind, rf"{shared} .*got float16, float32"),
        ("k-of-another-dtype", pool, {"k": Tensor.half}, kind, rf"{shared} .*got float32, float16"),
        ("v-of-another-dtype", pool, {"v": Tensor.half}, kind, rf"{shared} .*float32, float16"),
        ("integer-kv", pool, {"state": Tensor.int}, kind, r"state must be float32, bfloat16 or float16, got .*int32"),
        ("integer-z", pool, {"z": Tensor.int}, kind, r"z must be float32, bfloat16 or float16, got .*int32"),
        ("q-elsewhere", pool, {"q": to_meta}, value, r"must be on meta like q, got cpu"),
        *[
            (f"{name}-elsewhere", pool, {name: to_meta}, value, rf"{name} must be on cpu like q, got meta")
            for name in ("k", "v", "state", "z", "slots")
        ],
    ]
    return [Refusal(*row) for row in rows]


REFUSALS = [*(r for form in FORMS for r in of_form(form)), *of_dispatcher(), *of_normalize(), *of_step()]
