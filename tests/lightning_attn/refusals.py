"""Calls of lightning_attn that must be refused, and how. Each changes a call that works."""

from __future__ import annotations

from torch import Tensor

from tests.cases import Refusal
from tests.cases_lightning_attn import FORMS
from tests.refusals_linear_attn import FLOATING, Row, of_activations, of_packs, of_values
from tests.refusals_simple_gla import by_id, to_meta


def of_form(form: str) -> list[Refusal]:
    """What every form refuses."""
    found = by_id(form)
    case, packed = found["several-chunks-ragged-tail"], found["packed-int32-offsets"]
    value, kind, layer = ValueError, TypeError, r"layer_idx must be in \[0, num_layers\) = \[0, 5\), got"
    rows: list[Row] = [
        *of_activations(case, "v"),
        *of_packs(packed, found["packed-with-empty-and-one-step"]),
        *of_values(packed, 37),
        (
            "state-value-first",
            case,
            {"initial_state": lambda x: x.mT},
            value,
            r"initial_state must be \[N, H, K, V\] = \(2, 6, 10, 7\), got \(2, 6, 7, 10\)",
        ),
        ("integer-state", case, {"initial_state": Tensor.int}, kind, f"initial_state {FLOATING}"),
        ("state-elsewhere", case, {"initial_state": to_meta}, value, r"initial_state must be on cpu like q, got meta"),
        ("layer-past-the-last", case, {"layer_idx": 5}, value, f"{layer} 5"),
        ("layer-before-the-first", case, {"layer_idx": -1}, value, f"{layer} -1"),
        ("no-layers", case, {"layer_idx": 0, "num_layers": 0}, value, r"num_layers must be at least 1, got 0"),
        ("slopes-unknown", case, {"slopes": "steep"}, value, r"slopes must be one of linear, alibi, got 'steep'"),
    ]
    if form != "fused_recurrent_lightning_attn":
        rows += [("chunk-of-48", case, {"chunk_size": 48}, value, r"chunk_size must be .* from 16 to 256, got 48")]
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
