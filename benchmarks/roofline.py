"""The roofline: the work that an operator cannot avoid, and the rates that this machine reaches at most.

The floor of a pass is the least time that its work takes at those rates. A multiply-add counts as two operations. Bytes
count each input once and each output once. C is the chunk of 64 steps that the linear forms are counted with; fewer
steps than that make a smaller chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .machine import cache_bytes
from .timing import Implementation, measure

CHUNK = 64
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is timed
COPIED = {"cpu": 256 << 20, "cuda": 4 << 30}  # bytes
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read and written."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Roofline:
    """The measured peak rates: operations per second by dtype, and bytes per second."""

    flops: dict[str, float]
    bytes: float

    def rate(self, dtype: torch.dtype) -> float:
        """Operations per second of a matrix product in this dtype."""
        return self.flops[str(dtype).removeprefix("torch.")]

    def floor(self, work: Work, dtype: torch.dtype) -> float:
        """The least seconds for this work: those of its operations or those of its bytes, whichever are more."""
        return max(work.flops / self.rate(dtype), work.bytes / self.bytes)


def measure_roofline(device: torch.device, seconds: float) -> Roofline:
    """Time a square matrix product in each dtype, and a copy, whose bytes count as read and as written."""
    side = SIDE[device.type]
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        product = Implementation("product", lambda _, a=a, b=b, out=out: torch.mm(a, b, out=out))
        measure([product], device, seconds)
        flops[str(dtype).removeprefix("torch.")] = 2 * side**3 / min(product.samples)
    size = max(COPIED[device.type], 2 * cache_bytes(device) if device.type == "cuda" else 0)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = Implementation("copy", lambda _: target.copy_(source))
    measure([copy], device, seconds)
    return Roofline(flops, 2 * size / min(copy.samples))


def scalar_decay(s: Sizes, element: int, gated: bool = True) -> tuple[Work, Work]:
    """Count forward and backward of the chunkwise linear family, in one pass over the data."""
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


def no_decay(s: Sizes, element: int) -> tuple[Work, Work]:
    """Count the chunkwise linear family where no gate is read."""
    return scalar_decay(s, element, gated=False)


def delta_rule(s: Sizes, element: int) -> tuple[Work, Work]:
    """Count the chunkwise delta rule: the triangles of keys and of the system that is solved, beside those of linear
    attention; what keys read of the state. Backward recomputes the states.
    """
    n, key, value = s["B"] * s["T"] * s["H"], s["K"], s["V"]
    chunk = min(CHUNK, s["T"])
    return (
        Work(n * (2 * chunk * (key + value) + 6 * key * value), n * (element * (2 * key + 2 * value) + 8)),
        Work(n * (chunk * (7 * key + 5 * value) + 16 * key * value), n * (element * (4 * key + 3 * value) + 16)),
    )


def quadratic(s: Sizes, element: int) -> tuple[Work, Work]:
    """Count forward and backward of causal products over all pairs of steps."""
    n, key, value = s["B"] * s["T"] * s.get("HQ", s["H"]), s["K"], s["V"]
    share = s["H"] / s.get("HQ", s["H"])  # of the heads, for keys and values
    pairs = n * s["T"] / 2
    moved = element * (key + value + share * (key + value))
    return (
        Work(pairs * 2 * (key + value), n * (moved + 4)),
        Work(pairs * (6 * key + 4 * value), n * (2 * moved + element * value + 8)),
    )


def slot_attention(s: Sizes, element: int) -> tuple[Work, Work]:
    """Count gated slot attention: two linear passes, of widths K x M and M x V."""
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
    """Count one decode step, which reads and writes every state once, in float32."""
    states = s["N"] * s["H"] * (s["K"] * s["V"] if "M" not in s else s["M"] * (s["K"] + s["V"]))
    return Work(5 * states, 2 * 4 * states), Work(0, 0)


def cache_step(s: Sizes, element: int) -> tuple[Work, Work]:
    """Count one softmax decode step, which reads every key and value of the cache once."""
    cached = s["N"] * s["T"]
    width = s["K"] + s["V"]
    return Work(2 * cached * s["HQ"] * width, cached * (s["H"] * width * element + 4 * s["HQ"])), Work(0, 0)


def normalisation(s: Sizes, element: int) -> tuple[Work, Work]:
    """Count the division by the normaliser, which reads q, k and o and writes o; its backward moves twice that."""
    forward = Work(0, s["B"] * s["T"] * s["H"] * element * (2 * s["K"] + 2 * s["V"]))
    return forward, forward + forward


def convolution(s: Sizes, element: int) -> tuple[Work, Work]:
    """Count a causal convolution, which reads and writes every step once; its backward reads two and writes one."""
    numbers = s["B"] * s["T"] * s["D"]
    return Work(2 * numbers * s["W"], 2 * numbers * element), Work(6 * numbers * s["W"], 3 * numbers * element)


def convolution_step(s: Sizes, element: int) -> tuple[Work, Work]:
    """Count one step of it, which reads and writes the steps before once, as it does its own."""
    numbers = s["N"] * s["D"]
    return Work(2 * numbers * s["W"], 2 * numbers * s["W"] * element), Work(0, 0)
