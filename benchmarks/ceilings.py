"""What the machine can do at most: a plain matrix product and a plain copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .machine import cache_bytes
from .timing import Contender, measure

SIDE = {"cpu": 2048, "cuda": 8192}
COPIED = {"cpu": 256 << 20, "cuda": 4 << 30}


@dataclass(frozen=True)
class Ceilings:
    """Operations and bytes per second."""

    flops: dict[str, float]  # by dtype
    bytes: float

    def of(self, dtype: torch.dtype) -> float:
        """Operations per second of a matrix product in this dtype."""
        return self.flops[str(dtype).removeprefix("torch.")]


def measure_ceilings(device: torch.device, seconds: float) -> Ceilings:
    """A square matrix product in each dtype, and a copy; bytes count what is read and what is written."""
    side = SIDE[device.type]
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        product = Contender("product", lambda _, a=a, b=b, out=out: torch.mm(a, b, out=out))
        measure([product], device, seconds)
        flops[str(dtype).removeprefix("torch.")] = 2 * side**3 / min(product.samples)
    size = max(COPIED[device.type], 2 * cache_bytes(device) if device.type == "cuda" else 0)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = Contender("copy", lambda _: target.copy_(source))
    measure([copy], device, seconds)
    return Ceilings(flops, 2 * size / min(copy.samples))
