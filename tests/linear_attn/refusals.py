"""Calls of linear_attn that must be refused for a reason of their own; `tests.refusals` generates the others."""

from __future__ import annotations

from tests.linear_attn.cases import FORMS
from tests.refusals import Refusal, Row, beside_a_batch, by_id, of_chunk_size, of_packs, of_slots


def of_form(form: str) -> list[Refusal]:
    """What every form refuses."""
    found = by_id(form)
    case, value = found["several-chunks-ragged-tail"], ValueError
    rows: list[Row] = [
        *of_packs(found["packed-int32-offsets"]),
        beside_a_batch(case, "initial_state", "initial_z"),
        ("kv-without-z", case, {"initial_z": None}, value, r"initial_state must be a pair .*got no initial_z"),
        ("z-without-kv", case, {"initial_state": None}, value, r"initial_state must be a pair .*got initial_z alone"),
        ("pair-not-normalised", case, {"normalize": False}, value, r"with normalize=False, .* kv .* got a pair"),
    ]
    if "chunk_size" in case.declaration.fields:
        rows += of_chunk_size(case)
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
    """What the normalisation refuses."""
    found = by_id("normalize_output")
    packed = found["cu_seqlens+cu_seqlens_cpu"].resized(offsets=(0, 1, 2, 3, 4, 37))
    return [Refusal(*row) for row in (*of_packs(packed), beside_a_batch(found["ragged-tail"], "initial_z"))]


def of_step() -> list[Refusal]:
    """What the decode step refuses; neither pool is touched."""
    pool = by_id("linear_attn_step_")["pool-with-padding"]
    larger = r"z must be \[N, 1, H, K\] \(without slots\) = \(4, 1, 6, 5\), got \(9, 1, 6, 5\)"
    return [
        Refusal("pools-larger-than-N", pool, {"slots": None}, ValueError, larger),
        *(Refusal(*row) for row in of_slots(pool)),
    ]


REFUSALS = [*(r for form in FORMS for r in of_form(form)), *of_dispatcher(), *of_normalize(), *of_step()]
