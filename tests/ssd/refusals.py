"""Calls of ssd that must be refused for a reason of their own; `tests.refusals` generates the others."""

from __future__ import annotations

import torch

from tests.refusals import Refusal, Row, beside_a_batch, by_id, of_chunk_size, of_packs, of_slots


def of_ssd() -> list[Refusal]:
    """What the whole call refuses."""
    found = by_id("ssd")
    case, refused = found["several-chunks-ragged-tail"], NotImplementedError
    both = "give at most one of seq_idx and cu_seqlens, got seq_idx and cu_seqlens"
    numbers = {"seq_idx": torch.zeros(1, 37, dtype=torch.int64)}
    rows: list[Row] = [
        *of_packs(found["packed-int32-offsets"]),
        beside_a_batch(case, "initial_state"),
        *of_chunk_size(case),
        ("sequences-told-twice", found["packed-with-empty-and-one-step"], numbers, ValueError, both),
        ("mode-unknown", case, {"mode": "step"}, ValueError, r"mode must be auto, chunk, .*'step'"),
        ("mode-without-state", case, {"mode": "parallel"}, refused, "the quadratic form has no state"),
    ]
    return [Refusal(*row) for row in rows]


def of_step() -> list[Refusal]:
    """What the decode step refuses; the pool is not touched."""
    pool = by_id("ssd_step_")["pool-with-padding"]
    larger = r"state must be \[N, H, V, K\] \(without slots\) = \(4, 6, 7, 5\), got \(9, 6, 7, 5\)"
    rows: list[Row] = [*of_slots(pool), ("pool-larger-than-N", pool, {"slots": None}, ValueError, larger)]
    return [Refusal(*row) for row in rows]


REFUSALS = [*of_ssd(), *of_step()]
