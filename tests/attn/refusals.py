"""Calls of attn that must be refused, and how. Each changes a call that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.cases import Case, Refusal, cases
from tests.cases_attn import FORMS

Rows = list[tuple[str, Case, dict[str, Any], type[Exception], str]]
FLOATING = r"must be float64, float32, bfloat16 or float16, got int32"
INTEGRAL = r"must be int32 or int64, got .*float32"


def by_id(operator: str) -> dict[str, Case]:
    """The cases of an operator by their ids."""
    return {case.id: case for case in cases(operator)}


def to_meta(x: Tensor) -> Tensor:
    """On another device."""
    return x.to("meta")


def offsets(*values: int) -> Callable[[Tensor], Tensor]:
    """Other values, of the old dtype."""
    return lambda old: torch.tensor(values, dtype=old.dtype)


def dtypes_and_devices(full: Case, packed: Case) -> Rows:
    """What both forms refuse in the same words."""
    value, kind = ValueError, TypeError
    rows: Rows = [
        ("q-of-another-dtype", full, {"q": Tensor.double}, kind, r"q, k, v must share one of .*got float64, float32"),
        ("k-of-another-dtype", full, {"k": Tensor.half}, kind, r"q, k, v must share one of .*got float32, float16"),
        ("v-of-another-dtype", full, {"v": Tensor.bfloat16}, kind, r"q, k, v must share .*float32, float32, bfloat16"),
        ("integer-g", full, {"g": Tensor.int}, kind, f"g {FLOATING}"),
        ("integer-sinks", full, {"sink_bias": Tensor.int}, kind, f"sink_bias {FLOATING}"),
        ("float-offsets", packed, {"cu_seqlens": Tensor.float}, kind, f"cu_seqlens {INTEGRAL}"),
        ("q-elsewhere", full, {"q": to_meta}, value, r"must be on meta like q, got cpu"),
        ("offsets-elsewhere", packed, {"cu_seqlens": to_meta}, value, r"cu_seqlens must be on cpu like q, got meta"),
        ("sinks-of-key-heads", full, {"sink_bias": lambda x: x[:3]}, value, r"sink_bias must be \[HQ\] = \(6,?\), got"),
        ("window-of-none", full, {"window_size": 0}, value, r"window_size must be at least 1, got 0"),
        ("q-of-no-width", full, {"q": lambda x: x[..., :0]}, value, r"q must have K >= 1, got K = 0"),
        ("v-of-no-width", full, {"v": lambda x: x[..., :0]}, value, r"v must have V >= 1, got V = 0"),
        ("k-of-no-heads", full, {"k": lambda x: x[:, :, :0]}, value, r"k must have H >= 1, got H = 0"),
        (
            "heads-that-do-not-divide",
            full,
            {name: lambda x: x[:, :, :5] for name in ("q", "g")},
            value,
            r"q must have a multiple of the 3 heads of k and v, got 5 heads",
        ),
        *[
            (f"{name}-elsewhere", full, {name: to_meta}, value, rf"{name} must be on cpu like q, got meta")
            for name in ("k", "v", "g", "sink_bias")
        ],
    ]
    return rows


def of_parallel(form: str) -> list[Refusal]:
    """The parallel form, called by its name and through the dispatcher."""
    found = by_id(form)
    full, packed = found["everything"], found["packed-int32-offsets"]
    value, kind = ValueError, TypeError
    named = {"mode": "parallel"} if form == "attn" else {}
    rows: Rows = [
        (
            "q-without-batch",
            full,
            {"q": lambda x: x[0], **named},
            value,
            r"q must be \[B, T, HQ, K\], got \(37, 6, 10\)",
        ),
        ("k-shorter", full, {"k": lambda x: x[:, 1:]}, value, r"k must be .* = \(2, 37, 3, 10\), got \(2, 36, 3, 10\)"),
        ("k-narrower", full, {"k": lambda x: x[..., 1:]}, value, r"k must be \[B, T, H, K\] = .*got \(2, 37, 3, 9\)"),
        ("v-shorter", full, {"v": lambda x: x[:, 1:]}, value, r"v must be .* = \(2, 37, 3, 7\), got \(2, 36, 3, 7\)"),
        ("v-of-query-heads", full, {"v": lambda x: x.repeat(1, 1, 2, 1)}, value, r"v must be .*got \(2, 37, 6, 7\)"),
        ("v-without-heads", full, {"v": lambda x: x[:, :, 0]}, value, r"v must be \[B, T, H, V\], got \(2, 37, 7\)"),
        ("g-per-key-head", full, {"g": lambda x: x[..., :3]}, value, r"g must be \[B, T, HQ\] = \(2, 37, 6\), got"),
        ("g-heads-first", full, {"g": lambda x: x.mT}, value, r"g must be \[B, T, HQ\] = .*, got \(2, 6, 37\)"),
        (
            "offsets-beside-a-batch",
            full,
            {"cu_seqlens": torch.tensor([0, 5, 37])},
            value,
            r"packed sequences \(cu_seqlens\) need batch B = 1, got B = 2",
        ),
        ("offsets-as-a-matrix", packed, {"cu_seqlens": lambda x: x[None], **named}, value, r"cu_seqlens must be \[N"),
        ("offsets-from-1", packed, {"cu_seqlens": offsets(1, 1, 2, 3, 4, 37)}, value, r"must start at 0, got 1"),
        ("offsets-past-T", packed, {"cu_seqlens": offsets(0, 1, 2, 3, 4, 38)}, value, r"must end at T = 37, got 38"),
        (
            "offsets-that-fall",
            packed,
            {"cu_seqlens": offsets(0, 9, 8, 20, 21, 37)},
            value,
            r"cu_seqlens must never fall, got 9 then 8 at position 1",
        ),
        ("indices-alone", packed, {"cu_seqlens": None}, value, r"chunk_indices was given without cu_seqlens"),
        (
            "indices-of-three",
            packed,
            {"chunk_indices": lambda x: x.view(-1)[:6].view(2, 3)},
            value,
            r"chunk_indices must",
        ),
        ("float-indices", packed, {"chunk_indices": Tensor.float}, kind, f"chunk_indices {INTEGRAL}"),
        ("indices-elsewhere", packed, {"chunk_indices": to_meta}, value, r"chunk_indices must be on cpu like q, got"),
    ]
    return [Refusal(*row) for row in (*rows, *dtypes_and_devices(full, packed))]


def of_decoding() -> list[Refusal]:
    """The decode step."""
    full = by_id("attn_decoding_one_step")["everything"]
    value = ValueError
    rows: Rows = [
        ("q-without-batch", full, {"q": lambda x: x[0]}, value, r"q must be \[1, N, HQ, K\], got \(4, 6, 10\)"),
        (
            "q-of-two-sequences",
            full,
            {"q": lambda x: x[:, :2]},
            value,
            r"q must be .* = \(1, 4, 6, 10\), got \(1, 2, 6",
        ),
        ("k-narrower", full, {"k": lambda x: x[..., 1:]}, value, r"k must be \[1, T, H, K\] = .*, got \(1, 57, 3, 9\)"),
        ("k-of-two-rows", full, {"k": lambda x: x.repeat(2, 1, 1, 1)}, value, r"need batch B = 1, got B = 2"),
        ("v-shorter", full, {"v": lambda x: x[:, 1:]}, value, r"v must be .* = \(1, 57, 3, 7\), got \(1, 56, 3, 7\)"),
        ("g-per-key-head", full, {"g": lambda x: x[..., :3]}, value, r"g must be \[1, T, HQ\] = \(1, 57, 6\), got"),
        ("offsets-as-a-matrix", full, {"cu_seqlens": lambda x: x[None]}, value, r"cu_seqlens must be \[N \+ 1\], got"),
        ("offsets-past-T", full, {"cu_seqlens": offsets(0, 1, 2, 3, 58)}, value, r"must end at T = 57, got 58"),
    ]
    return [Refusal(*row) for row in (*rows, *dtypes_and_devices(full, full))]


def of_dispatcher() -> list[Refusal]:
    """A named form is used or refused, with the reason."""
    found = by_id("attn")
    full, packed, step = found["everything"], found["packed-plain"], found["decoding"]
    refused = NotImplementedError
    return [
        Refusal(
            "mode-unknown", full, {"mode": "fast"}, ValueError, r"mode must be auto, parallel, decoding, got 'fast'"
        ),
        Refusal("decoding-without-offsets", full, {"mode": "decoding"}, refused, r"decoding needs cu_seqlens"),
        Refusal("decoding-every-step", packed, {"mode": "decoding"}, refused, r"q has 37 steps and cu_seqlens names 5"),
        Refusal("parallel-of-one-step", step, {"mode": "parallel"}, refused, r"q has 4 steps and k has 57"),
        Refusal(
            "scaled-gate-in-parallel", full, {"do_gate_scale": True}, refused, r"do_gate_scale belongs to decoding"
        ),
        Refusal(
            "a-gradient-of-decoding",
            step,
            {"q": lambda x: x.requires_grad_()},
            refused,
            r"decoding is for inference and has no gradient",
        ),
    ]


REFUSALS = [*(r for form in FORMS for r in of_parallel(form)), *of_decoding(), *of_dispatcher()]
