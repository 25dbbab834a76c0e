"""Calls of lightning_attn that must be refused for a reason of their own; `tests.refusals` generates the others."""

from __future__ import annotations

from tests.lightning_attn.cases import FORMS
from tests.refusals import Refusal, Row, beside_a_batch, by_id, of_chunk_size, of_packs


def of_form(form: str) -> list[Refusal]:
    """What every form refuses."""
    found = by_id(form)
    case, value = found["several-chunks-ragged-tail"], ValueError
    layer = r"layer_idx must be in \[0, num_layers\) = \[0, 5\), got"
    rows: list[Row] = [
        *of_packs(found["packed-int32-offsets"]),
        beside_a_batch(case, "initial_state"),
        ("layer-past-the-last", case, {"layer_idx": 5}, value, f"{layer} 5"),
        ("layer-before-the-first", case, {"layer_idx": -1}, value, f"{layer} -1"),
        ("no-layers", case, {"layer_idx": 0, "num_layers": 0}, value, r"num_layers must be at least 1, got 0"),
        ("slopes-unknown", case, {"slopes": "steep"}, value, r"slopes must be one of linear, alibi, got 'steep'"),
    ]
    if "chunk_size" in case.declaration.fields:
        rows += of_chunk_size(case)
    return [Refusal(*row) for row in rows]


def of_dispatcher() -> list[Refusal]:
    """A named form is used or refused, with the reason."""
    case, backwards = by_id("lightning_attn")["several-chunks-ragged-tail"], r"reverse=True runs time backwards"
    refused = NotImplementedError
    return [
        Refusal("mode-unknown", case, {"mode": "parallel"}, ValueError, r"mode must be auto, chunk, .*'parallel'"),
        Refusal("chunk-reversed", case, {"mode": "chunk", "reverse": True}, refused, f"mode='chunk': {backwards}"),
        Refusal("fused-reversed", case, {"mode": "fused_chunk", "reverse": True}, refused, backwards),
    ]


REFUSALS = [*(r for form in FORMS for r in of_form(form)), *of_dispatcher()]
