"""Calls of gsa that must be refused for a reason of their own; `tests.refusals` generates the others."""

from __future__ import annotations

import torch

from tests.gsa.cases import FORMS
from tests.refusals import Refusal, Row, beside_a_batch, by_id, of_chunk_size, of_packs, of_slots


def of_form(form: str) -> list[Refusal]:
    """What a form refuses, of the arguments that it takes."""
    found = by_id(form)
    gated = found["several-chunks-ragged-tail"]
    taken, level = gated.declaration.fields, r"checkpoint_level must be 0, 1 or 2, got 3"
    rows: list[Row] = [*of_packs(found["packed-int32-offsets"]), beside_a_batch(gated, "initial_k", "initial_v")]
    if "chunk_size" in taken:
        rows += of_chunk_size(gated)
    if "checkpoint_level" in taken:
        rows.append(("level-of-3", gated, {"checkpoint_level": 3}, ValueError, level))
    return [Refusal(*row) for row in rows]


def of_dispatcher() -> list[Refusal]:
    """A named form is used or refused, with the reason."""
    gated = by_id("gsa")["several-chunks-ragged-tail"]
    backwards = r"mode='chunk': reverse=True runs time backwards"
    return [
        Refusal("mode-unknown", gated, {"mode": "fast"}, ValueError, r"mode must be auto, chunk, .*, got 'fast'"),
        Refusal("chunk-reversed", gated, {"mode": "chunk", "reverse": True}, NotImplementedError, backwards),
    ]


def of_step() -> list[Refusal]:
    """What the decode step refuses; neither pool is touched."""
    pool = by_id("gsa_step_")["pool-with-padding"]
    larger = r"state_k must be \[N, H, K, M\] .* = \(4, 3, 5, 8\), got \(9, 3, 5, 8\)"
    return [
        Refusal("pools-larger-than-N", pool, {"slots": None}, ValueError, larger),
        *(Refusal(*row) for row in of_slots(pool)),
    ]


def of_prefill() -> list[Refusal]:
    """What the prefill refuses; neither pool is touched."""
    found = by_id("gsa_prefill_")
    batch = found["batch-with-padding"]
    larger = r"state_k must be \[N, H, K, M\] .* = \(3, 3, 10, 8\), got \(9, 3, 10, 8\)"
    rows: list[Row] = [
        ("pools-larger-than-N", batch, {"slots": None}, ValueError, larger),
        *of_packs(found["packed-int32"]),
        beside_a_batch(batch.resized(B=2), "slots", "fresh"),
        *of_slots(batch.resized(B=4)),
        *of_chunk_size(batch),
    ]
    return [Refusal(*row) for row in rows]


def of_advance() -> list[Refusal]:
    """What an advance refuses; neither pool is touched."""
    pool = by_id("gsa_advance_")["pools-with-padding"]
    larger = r"state_k must be \[N, H, K, M\] .* = \(4, 3, 10, 8\), got \(9, 3, 10, 8\)"
    rows: list[Row] = [("pools-larger-than-N", pool, {"slots": None}, ValueError, larger), *of_slots(pool)]
    for reason, count in (("more-than-there-are", 6), ("fewer-than-none", -1)):
        message = rf"accepted must be in \[0, T\] with T = 5, got {count}"
        rows.append((reason, pool, {"accepted": torch.tensor([0, 1, count, 2])}, ValueError, message))
    return [Refusal(*row) for row in rows]


def of_record() -> list[Refusal]:
    """What the states refuse."""
    found = by_id("gsa_states")
    batch, packed = found["ragged-tail"], found["packed-int32"].resized(offsets=(0, 1, 2, 3, 4, 37))
    stretch = "every must be a multiple of chunk_size = 16, got {}"
    rows: list[Row] = [
        *((f"every-{n}", batch, {"every": n}, ValueError, stretch.format(n)) for n in (0, 8, 40)),
        *of_packs(packed),
        beside_a_batch(batch, "initial_k", "initial_v"),
        *of_chunk_size(batch),
    ]
    return [Refusal(*row) for row in rows]


REFUSALS = [
    *(r for form in FORMS for r in of_form(form)),
    *of_dispatcher(),
    *of_step(),
    *of_prefill(),
    *of_advance(),
    *of_record(),
]
