"""Calls of the gated delta rule that must be refused for their own reasons; `tests.refusals` generates the others."""

from __future__ import annotations

from tests.gated_delta_rule.cases import FORMS
from tests.refusals import Refusal, Row, beside_a_batch, by_id, of_chunk_size, of_packs, of_slots


def of_form(form: str) -> list[Refusal]:
    """What a form refuses, of the arguments that it takes."""
    found = by_id(form)
    gated, packed = found["several-chunks-ragged-tail"], found["packed-int32-offsets"]
    pattern = r"initial_state must be \[N, H, V, K\] \(state_v_first=True\) = \(2, 6, 7, 10\), got \(2, 6, 10, 7\)"
    rows: list[Row] = [
        *of_packs(packed),
        beside_a_batch(gated, "initial_state"),
        ("state-key-first-said-to-be-value-first", gated, {"state_v_first": True}, ValueError, pattern),
    ]
    if "chunk_size" in gated.declaration.fields:
        rows += of_chunk_size(gated)
    if "mode" in gated.declaration.fields:
        unknown = r"mode must be auto, chunk, fused_recurrent, got 'parallel'"
        rows.append(("mode-unknown", gated, {"mode": "parallel"}, ValueError, unknown))
    return [Refusal(*row) for row in rows]


def of_step() -> list[Refusal]:
    """What the decode step refuses."""
    pool = by_id("gated_delta_rule_step_")["pool-with-padding"]
    larger = r"state must be \[N, H, K, V\] \(without slots\) = \(4, 6, 5, 7\), got \(9, 6, 5, 7\)"
    return [
        Refusal("pool-larger-than-N", pool, {"slots": None}, ValueError, larger),
        *(Refusal(*row) for row in of_slots(pool)),
    ]


REFUSALS = [*(r for form in FORMS for r in of_form(form)), *of_step()]
