"""Rows of state pools on a CPU, worked on in blocks: few calls where states are small, few cache misses where not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 18  # numbers: the states of a block stay in a core's second-level cache between the calls on them

Index = slice | Tensor


def blocks(rows: list[int], numbers: int) -> Iterator[tuple[Index, Index]]:
    """Which sequences, and which rows of a pool with `numbers` numbers each, to work on together; without padding."""
    used = [n for n, row in enumerate(rows) if row >= 0]
    together = max(1, BLOCK // max(1, numbers))
    for first in range(0, len(used), together):
        block = used[first : first + together]
        yield _index(block), _index([rows[n] for n in block])


def update(pool: Tensor, at: Index, held: Tensor, current: Tensor) -> None:
    """Write rows back, unless `held = pool[at]` is a view that was worked on itself."""
    if isinstance(at, Tensor) or current.data_ptr() != held.data_ptr():
        pool[at] = current.to(pool.dtype).view_as(held)


def _index(numbers: list[int]) -> Index:
    """A slice where each number follows the one before."""
    first, last = numbers[0], numbers[-1]
    if numbers == list(range(first, last + 1)):
        return slice(first, last + 1)
    return torch.tensor(numbers)
