"""Calls of attn that must be refused for a reason of their own; `tests.refusals` generates the others."""

from __future__ import annotations

import torch

from tests.attn.cases import FORMS
from tests.refusals import Refusal, Row, beside_a_batch, by_id, of_packs, offsets

NEGATIVE_WINDOW = "window_size must be at least 0, got -1"


def of_parallel(form: str) -> list[Refusal]:
    """The parallel form, called by its name and through the dispatcher."""
    found = by_id(form)
    full, packed = found["everything"], found["packed-int32-offsets"]
    rows: list[Row] = [
        *(row for row in of_packs(packed) if row[0] != "offsets-of-no-sequence"),
        beside_a_batch(full),
        ("indices-alone", packed, {"cu_seqlens": None}, ValueError, "chunk_indices was given without cu_seqlens"),
        ("window-below-none", full, {"window_size": -1}, ValueError, NEGATIVE_WINDOW),
    ]
    return [Refusal(*row) for row in rows]


def of_decoding() -> list[Refusal]:
    """The decode step."""
    full, value = by_id("attn_decoding_one_step")["everything"], ValueError
    past, one = offsets(0, 1, 2, 3, 58), r"k must be \[1, T, H, K\] = \(1, 57, 3, 10\), got \(2, 57, 3, 10\)"
    rows: list[Row] = [
        ("k-of-two-rows", full, {"k": lambda x: x.repeat(2, 1, 1, 1)}, value, one),
        ("offsets-past-T", full, {"cu_seqlens": past}, value, r"must end at T = 57, got 58"),
        ("window-below-none", full, {"window_size": -1}, value, NEGATIVE_WINDOW),
    ]
    return [Refusal(*row) for row in rows]


def of_prefill() -> list[Refusal]:
    """The rectangular form."""
    found, value = by_id("attn_prefill"), ValueError
    full, packed, bare = found["everything"], found["packed-int32-offsets"], found["plain"]
    rows: list[Row] = [
        ("offsets-past-T", packed, {"cu_seqlens": offsets(0, 0, 1, 9, 9, 23)}, value, "must end at T = 22, got 23"),
        (
            "offsets-past-TK",
            packed,
            {"cu_seqlens_k": offsets(0, 3, 4, 21, 25, 44)},
            value,
            "must end at TK = 43, got 44",
        ),
        (
            "key-offsets-from-1",
            packed,
            {"cu_seqlens_k": offsets(1, 3, 4, 21, 25, 43)},
            value,
            "_k must start at 0, got 1",
        ),
        ("key-offsets-that-fall", packed, {"cu_seqlens_k": offsets(0, 3, 2, 21, 25, 43)}, value, "_k must never fall"),
        ("offsets-alone", packed, {"cu_seqlens_k": None}, value, "cu_seqlens was given without cu_seqlens_k"),
        ("key-offsets-alone", packed, {"cu_seqlens": None}, value, "cu_seqlens_k was given without cu_seqlens"),
        (
            "offsets-of-a-batch",
            full,
            dict.fromkeys(("cu_seqlens", "cu_seqlens_k"), torch.tensor([0, 13])),
            value,
            "B = 2",
        ),
        ("window-below-none", full, {"window_size": -1}, value, NEGATIVE_WINDOW),
        ("no-cap", full, {"softcap": 0.0}, value, r"softcap must be above 0, got 0\.0"),
        ("negative-gap", full, {"gap": -1}, value, "gap must be at least 0, got -1"),
        ("decay-without-gap", full, {"gap": None}, value, "decay was given without gap"),
        ("longer-values", bare, {"v": lambda x: x.repeat(1, 2, 1, 1)}, value, r"v must be \[B, TK, H, V\]"),
    ]
    return [Refusal(*row) for row in rows]


def of_dispatcher() -> list[Refusal]:
    """A named form is used or refused, with the reason."""
    found = by_id("attn")
    full, packed, step = found["everything"], found["packed-plain"], found["decoding"]
    gradient = {"q": lambda x: x.requires_grad_()}
    refused, names = NotImplementedError, r"mode must be auto, parallel, decoding, got 'fast'"
    return [
        Refusal("mode-unknown", full, {"mode": "fast"}, ValueError, names),
        Refusal("decoding-without-offsets", full, {"mode": "decoding"}, refused, "decoding needs cu_seqlens"),
        Refusal("decoding-every-step", packed, {"mode": "decoding"}, refused, "q has 37 steps and cu_seqlens names 5"),
        Refusal("parallel-of-one-step", step, {"mode": "parallel"}, refused, "q has 4 steps and k has 57"),
        Refusal("gate-scale-in-parallel", full, {"do_gate_scale": True}, refused, "do_gate_scale belongs to decoding"),
        Refusal("a-gradient-of-decoding", step, gradient, refused, "decoding is for inference and has no gradient"),
    ]


REFUSALS = [*(r for form in FORMS for r in of_parallel(form)), *of_prefill(), *of_decoding(), *of_dispatcher()]
