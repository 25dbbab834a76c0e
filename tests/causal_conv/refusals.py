"""Calls of causal_conv that must be refused for a reason of their own; `tests.refusals` generates the others."""

from __future__ import annotations

import torch

from tests.refusals import Refusal, Row, beside_a_batch, by_id, of_packs, of_slots


def of_convolution() -> list[Refusal]:
    """What the convolution refuses."""
    found = by_id("causal_conv")
    full, wrong = found["ragged-tail"], ValueError
    bare = found["two-taps"]
    rows: list[Row] = [
        *of_packs(found["packed-int32-offsets"]),
        beside_a_batch(full, "initial_state"),
        (
            "activation-unknown",
            full,
            {"activation": "gelu"},
            wrong,
            "activation must be None, silu or swish, got 'gelu'",
        ),
        ("too-many-taps", bare, {"weight": torch.zeros(6, 9)}, wrong, "weight must have W <= 8, got W = 9"),
        (
            "state-as-long-as-the-taps",
            full,
            {"initial_state": torch.zeros(2, 6, 4)},
            wrong,
            r"initial_state must be \[N, D, W-1\] = \(2, 6, 3\), got \(2, 6, 4\)",
        ),
    ]
    return [Refusal(*row) for row in rows]


def of_step() -> list[Refusal]:
    """What the decode step refuses; the pool is not touched."""
    pool = by_id("causal_conv_step_")["pool-with-padding"]
    short, larger = torch.zeros(9, 6, 2), r"state must be \[N, D, S\] \(without slots\) = \(4, 6, 5\), got \(9, 6, 5\)"
    rows: list[Row] = [
        *of_slots(pool),
        ("pool-larger-than-N", pool, {"slots": None}, ValueError, larger),
        ("state-too-short", pool, {"state": short}, ValueError, r"state must have S >= W - 1 = 3, got S = 2"),
        ("activation-unknown", pool, {"activation": "tanh"}, ValueError, "activation must be None, .* got 'tanh'"),
    ]
    return [Refusal(*row) for row in rows]


REFUSALS = [*of_convolution(), *of_step()]
