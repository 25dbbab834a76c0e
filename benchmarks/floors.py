"""The least that an operator must do: floating-point operations and bytes, and the time they take at measured ceilings.

A multiply-add counts as two operations. Bytes count each input once and each output once. C is the chunk of 64 steps
that the linear forms are counted with; fewer steps than that make a smaller chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CHUNK = 64
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Work:
    """Operations and bytes."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The floor: whichever of the two takes longer."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def scalar_decay(s: Sizes, element: int, gated: bool = True) -> tuple[Work, Work]:
    """Forward and backward of the chunkwise linear family, in one pass over the data."""
    n, key, value = s["B"] * s["T"] * s["H"], s["K"], s["V"]
    chunk = min(CHUNK, s["T"])
    gate = 4 * gated
    return (
        Work(n * (2 * chunk * (key + value) + 4 * key * value), n * (element * (2 * key + 2 * value) + gate)),
        Work(
            n * (chunk * (6 * key + 4 * value) + 10 * key * value),
            n * (element * (4 * key + 3 * value) + 2 * gate),
        ),
    )


def quadratic(s: Sizes, element: int) -> tuple[Work, Work]:
    """Forward and backward of causal products over all pairs of steps; a window bounds the pairs."""
    n, key, value = s["B"] * s["T"] * s.get("HQ", s["H"]), s["K"], s["V"]
    share = s["H"] / s.get("HQ", s["H"])  # of the heads, for keys and values
    pairs = n * s["T"] / 2
    moved = element * (key + value + share * (key + value))
    return (
        Work(pairs * 2 * (key + value), n * (moved + 4)),
        Work(pairs * (6 * key + 4 * value), n * (2 * moved + element * value + 8)),
    )


def slots(s: Sizes, element: int) -> tuple[Work, Work]:
    """Gated slot attention: two linear passes, of widths K x M and M x V."""
    n, key, value, m = s["B"] * s["T"] * s["H"], s["K"], s["V"], s["M"]
    chunk = min(CHUNK, s["T"])
    forward = backward = 0.0
    for a, b in ((key, m), (m, value)):
        forward += n * (2 * chunk * (a + b) + 4 * a * b)
        backward += n * (chunk * (6 * a + 4 * b) + 10 * a * b)
    return (
        Work(forward, n * element * (2 * key + 2 * value + 2 * m)),
        Work(backward, n * element * (4 * key + 3 * value + 4 * m)),
    )


def state_step(s: Sizes, _element: int) -> tuple[Work, Work]:
    """One decode step: every state is read and written once, in float32."""
    states = s["N"] * s["H"] * (s["K"] * s["V"] if "M" not in s else s["M"] * (s["K"] + s["V"]))
    return Work(5 * states, 2 * 4 * states), Work(0, 0)


def cache_step(s: Sizes, element: int) -> tuple[Work, Work]:
    """One softmax decode step: every key and value of the cache is read once."""
    cached = s["N"] * s["T"]
    width = s["K"] + s["V"]
    return Work(2 * cached * s["HQ"] * width, cached * (s["H"] * width * element + 4 * s["HQ"])), Work(0, 0)


def elementwise(s: Sizes, element: int) -> tuple[Work, Work]:
    """The division by the normaliser: q, k and o are read, o is written; the backward pass moves twice that."""
    forward = Work(0, s["B"] * s["T"] * s["H"] * element * (2 * s["K"] + 2 * s["V"]))
    return forward, forward + forward
