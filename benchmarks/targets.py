"""The targets that the project set itself, checked against the rows of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .comparison import Row
from .peers import PRODUCT
from .problems import DECODE, FORWARD, TRAINING
from .roofline import SIDE

CHUNK = "chunk_simple_gla"
STEP = "simple_gla_step_"
EAGER = "fla_ops eager"
NAIVE, MAMBA, SOFTMAX = "fla-core naive_chunk", "transformers Mamba-2", "softmax attention"


@dataclass(frozen=True)
class Target:
    """A number that must reach a bound; `find` returns None if the run did not measure it."""

    text: str
    bound: float
    find: Callable[[Sequence[Row]], float | None]


def _row(rows: Sequence[Row], operator: str, pass_: str, who: str) -> Row | None:
    """Find the first such row at the usual decay."""
    return next(
        (r for r in rows if (r["operator"], r["pass"], r["who"]) == (operator, pass_, who) and not r["strong"]), None
    )


def _faster_than(pass_: str, peer: str, operator: str = CHUNK) -> Callable[[Sequence[Row]], float | None]:
    def find(rows: Sequence[Row]) -> float | None:
        row = _row(rows, operator, pass_, EAGER)
        if row is None:
            return None
        return next((ratio for name, ratio in row["faster_than"].items() if name.startswith(peer)), None)

    return find


def _of_product(rows: Sequence[Row]) -> float | None:
    """Compare with a matrix product timed in the same rounds, since a shared machine is faster at some moments."""
    found = [_row(rows, CHUNK, FORWARD, f"fla_ops {way}") for way in ("compiled", "inlined")]
    return max(
        (
            r["flops"] / (2 * SIDE["cpu"] ** 3) * r["faster_than"][PRODUCT]
            for r in found
            if r and PRODUCT in r["faster_than"]
        ),
        default=None,
    )


def _half(rows: Sequence[Row]) -> float | None:
    whole, half = (_row(rows, CHUNK, FORWARD, name) for name in (EAGER, f"{EAGER} bfloat16"))
    return whole["median_ms"] / half["median_ms"] if whole and half else None


CPU = (
    Target("chunk forward, times faster than fla-core naive_chunk", 2.0, _faster_than(FORWARD, NAIVE)),
    Target("chunk forward+backward, likewise", 6.0, _faster_than(TRAINING, NAIVE)),
    Target("chunk forward, times faster than transformers' Mamba-2", 2.5, _faster_than(FORWARD, MAMBA)),
    Target("chunk forward+backward, likewise", 2.0, _faster_than(TRAINING, MAMBA)),
    Target("chunk forward compiled, share of a matrix product's rate", 0.30, _of_product),
    Target("decode step, speed relative to a copy of the state", 0.90, _faster_than(DECODE, "copy of the state", STEP)),
    Target("parallel_attn with decay, forward, speed relative to PyTorch's plain causal attention", 1 / 1.3,
           _faster_than(FORWARD, SOFTMAX, "parallel_attn")),
    Target("parallel_attn with decay, forward+backward, likewise", 1 / 1.6,
           _faster_than(TRAINING, SOFTMAX, "parallel_attn")),
    Target("chunk forward in bfloat16, speed relative to float32", 1.0, _half),
)  # fmt: skip


def check(rows: Sequence[Row], device: str, quick: bool) -> list[dict[str, Any]]:
    """Check the targets that a run measured; there are targets for a CPU at full size only."""
    if device != "cpu" or quick:
        return []
    found = [{"target": t.text, "bound": t.bound, "measured": t.find(rows)} for t in CPU]
    return [{**t, "met": t["measured"] >= t["bound"]} for t in found if t["measured"] is not None]


def lines(targets: Sequence[dict[str, Any]]) -> str:
    """Write one line for each target."""
    return "\n".join(
        f"  {'met    ' if t['met'] else 'NOT MET'}  {t['target']}: {t['measured']:.2f} (target {t['bound']:.2f})"
        for t in targets
    )
