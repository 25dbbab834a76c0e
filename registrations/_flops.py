"""FLOP formulas, over the shapes that `torch.utils.flop_counter` passes. A multiply-add counts as two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._when_imported import when_imported

CHUNK = 64
COUNTER = "torch.utils.flop_counter"


def register(packet: Any, formula: Callable[..., int]) -> None:
    """Make FlopCounterMode count `packet`: now if the counter is imported, else when it will be (it imports Triton)."""
    when_imported(COUNTER, lambda counter: counter.register_flop_formula(packet)(formula))


def _sizes(q: Any, v: Any) -> tuple[int, int, int, int]:
    """Steps over all value heads, and the widths."""
    batch, time, _, key_width = q
    return batch * time * v[2], key_width, v[3], time


def linear_chunk(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    """Scores and their product with v inside a chunk; the state's update and its read-out across chunks."""
    steps, key, value, _time = _sizes(q, v)
    return steps * (2 * CHUNK * (key + value) + 4 * key * value)


def linear_chunk_backward(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    steps, key, value, _time = _sizes(q, v)
    return steps * (CHUNK * (6 * key + 4 * value) + 10 * key * value)


def linear_recurrent(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    """Decay, outer product and read-out of the state at each step."""
    steps, key, value, _time = _sizes(q, v)
    return steps * 5 * key * value


def linear_recurrent_backward(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    return 3 * linear_recurrent(q, k, v)


def linear_parallel(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    """The lower triangle of two T x T products."""
    steps, key, value, time = _sizes(q, v)
    return steps * time * (key + value)


def linear_parallel_backward(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    steps, key, value, time = _sizes(q, v)
    return steps * time * (3 * key + 2 * value)


def linear_step(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    sequences, heads, value = v
    return int(sequences * heads * 5 * q[-1] * value)
