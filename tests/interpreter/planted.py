"""Kernels with one fault each, and one without, for the checker's own tests."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x, y, size, BLOCK: tl.constexpr):
    """No fault, if `size` is the tensors'."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < size), mask=at < size)


@triton.jit
def same_block_kernel(y, BLOCK: tl.constexpr):
    """Every program stores the first block, and the same value."""
    at = tl.arange(0, BLOCK)
    tl.store(y + at, at.to(tl.float32))


@triton.jit
def neighbour_kernel(y, BLOCK: tl.constexpr):
    """A program stores its block and loads that of the program before."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(y + at - BLOCK, mask=at >= BLOCK, other=0.0)
    tl.store(y + at, before + 1.0)


@triton.jit
def same_place_kernel(y, BLOCK: tl.constexpr):
    """One store names every element twice."""
    tl.store(y + tl.arange(0, BLOCK) // 2, tl.zeros([BLOCK], tl.float32))


@triton.jit
def mirror_kernel(y, BLOCK: tl.constexpr, ORDERED: tl.constexpr):
    """A program loads, from other threads, what it stored; ORDERED by a barrier."""
    at = tl.arange(0, BLOCK)
    tl.store(y + at, at.to(tl.float32))
    if ORDERED:
        tl.debug_barrier()
    mirrored = tl.load(y + BLOCK - 1 - at)
    if ORDERED:
        tl.debug_barrier()
    tl.store(y + at, mirrored)


@triton.jit
def update_kernel(y, BLOCK: tl.constexpr, ORDERED: tl.constexpr):
    """An update in place; ORDERED by a barrier between load and store."""
    at = tl.arange(0, BLOCK)
    old = tl.load(y + at)
    if ORDERED:
        tl.debug_barrier()
    tl.store(y + at, old + 1.0)


@triton.jit
def rows_kernel(x, stride, BLOCK: tl.constexpr):
    """Offsets of rows in 32 bits."""
    tl.store(x + tl.program_id(0) * stride + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@triton.jit
def atomic_kernel(y, BLOCK: tl.constexpr):
    """Programs add to the same elements."""
    tl.atomic_add(y + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32) + 1.0)
