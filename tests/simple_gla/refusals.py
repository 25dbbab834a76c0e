"""Calls of simple_gla that must be refused for a reason of their own; `tests.refusals` generates the others."""

from __future__ import annotations

import torch

from tests.refusals import Refusal, Row, beside_a_batch, by_id, of_chunk_size, of_packs, of_slots
from tests.simple_gla.cases import FORMS

GATED = "several-chunks-ragged-tail"
BOTH_DECAYS = r"give at most one of g and g_gamma, got g and g_gamma"


def of_form(form: str) -> list[Refusal]:
    """What a form refuses, of the arguments that it takes."""
    found = by_id(form)
    gated, packed = found[GATED], found["packed-int32-offsets"]
    taken, value = gated.declaration.fields, ValueError
    rows: list[Row] = [
        ("both-decays", gated, {"g_gamma": torch.zeros(6)}, value, BOTH_DECAYS),
        *of_packs(packed),
        beside_a_batch(gated, *(name for name in ("initial_state",) if name in taken)),
    ]
    if "state_v_first" in taken:
        pattern = r"initial_state must be \[N, H, V, K\] \(state_v_first=True\) = \(2, 6, 7, 10\), got \(2, 6, 10, 7\)"
        rows.append(("state-key-first-said-to-be-value-first", gated, {"state_v_first": True}, value, pattern))
    if "chunk_size" in taken:
        rows += of_chunk_size(gated)
    return [Refusal(*row) for row in rows]


def of_dispatcher() -> list[Refusal]:
    """A named form is used or refused, with the reason."""
    gated = by_id("simple_gla")[GATED]
    refused = NotImplementedError
    backwards, state = r"reverse=True runs time backwards", r"the quadratic form has no state"
    both = f"{backwards}.*; {state}"
    return [
        Refusal("mode-unknown", gated, {"mode": "fast"}, ValueError, r"mode must be auto, chunk, .*, got 'fast'"),
        Refusal("parallel-with-state", gated, {"mode": "parallel"}, refused, f"mode='parallel': {state}"),
        Refusal("parallel-reversed-with-state", gated, {"mode": "parallel", "reverse": True}, refused, both),
    ]


def of_step() -> list[Refusal]:
    """What the decode step refuses."""
    pool = by_id("simple_gla_step_")["pool-with-padding"]
    larger = r"state must be \[N, H, K, V\] \(without slots\) = \(4, 6, 5, 7\), got \(9, 6, 5, 7\)"
    return [
        Refusal("both-decays", pool, {"g_gamma": torch.zeros(6)}, ValueError, BOTH_DECAYS),
        Refusal("pool-larger-than-N", pool, {"slots": None}, ValueError, larger),
        *(Refusal(*row) for row in of_slots(pool)),
    ]


def of_prefill() -> list[Refusal]:
    """What the prefill refuses."""
    found = by_id("simple_gla_prefill_")
    batch, packed = found["batch-with-padding"], found["packed-int32"]
    four = batch.resized(B=4)
    larger = r"state must be \[N, H, K, V\] \(without slots\) = \(3, 6, 10, 7\), got \(9, 6, 10, 7\)"
    rows: list[Row] = [
        ("both-decays", batch, {"g_gamma": torch.zeros(6)}, ValueError, BOTH_DECAYS),
        ("pool-larger-than-N", batch, {"slots": None}, ValueError, larger),
        *of_packs(packed),
        beside_a_batch(batch.resized(B=2), "slots", "fresh"),
        *of_slots(four),
        *of_chunk_size(batch),
    ]
    return [Refusal(*row) for row in rows]


def of_advance() -> list[Refusal]:
    """What an advance refuses."""
    pool = by_id("simple_gla_advance_")["pool-with-padding"]
    larger = r"state must be \[N, H, K, V\] \(without slots\) = \(4, 6, 10, 7\), got \(9, 6, 10, 7\)"
    rows: list[Row] = [
        ("both-decays", pool, {"g_gamma": torch.zeros(6)}, ValueError, BOTH_DECAYS),
        ("pool-larger-than-N", pool, {"slots": None}, ValueError, larger),
        *of_slots(pool),
    ]
    for reason, count in (("more-than-there-are", 6), ("fewer-than-none", -1)):
        message = rf"accepted must be in \[0, T\] with T = 5, got {count}"
        rows.append((reason, pool, {"accepted": torch.tensor([0, 1, count, 2])}, ValueError, message))
    return [Refusal(*row) for row in rows]


def of_record() -> list[Refusal]:
    """What the states refuse."""
    found = by_id("simple_gla_states")
    batch, packed = found["ragged-tail"], found["packed-int32"].resized(offsets=(0, 1, 2, 3, 4, 37))
    stretch = "every must be a multiple of chunk_size = 16, got {}"
    rows: list[Row] = [
        ("both-decays", batch, {"g_gamma": torch.zeros(6)}, ValueError, BOTH_DECAYS),
        *((f"every-{n}", batch, {"every": n}, ValueError, stretch.format(n)) for n in (0, 8, 40)),
        *of_packs(packed),
        beside_a_batch(batch, "initial_state"),
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
