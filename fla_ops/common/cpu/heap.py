"""Keeps memory that was freed on a CPU in the process, so that the next call does not fault its pages in again."""

from __future__ import annotations

from functools import cache

import torch

LARGEST = (32 << 20) - (64 << 10)  # bytes: glibc adapts to blocks of up to 32 MiB


@cache
def keep_freed() -> None:
    """Allocate and free one large block, never touched.

    From then on glibc takes blocks up to that size from the heap instead of mapping each anew, and gives back what is
    free at the heap's top from twice that size. Any program that frees a tensor of 32 MiB is in this state; in one that
    has not yet, page faults take up to a third of a training step's time. With MALLOC_MMAP_THRESHOLD_ or
    MALLOC_TRIM_THRESHOLD_ set, glibc does not adapt, and this has no effect.
    """
    torch.UntypedStorage(LARGEST)
