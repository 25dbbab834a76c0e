"""A state from chunk to chunk, S <- d S - L (R S) + A: one chunk after the other, or as a tree where code is traced.

Traced code cannot loop over a number of chunks that is symbolic. There, each chunk is a map S -> M S + A with
M = d I - L R, and two maps in a row are a map again. Chunks are composed in blocks of 16, the blocks' ends are the
chunks of the next level, and there are as many levels as any length needs. Nothing passes the first chunk of a
sequence, not even a NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fla_ops.common.cpu.layouts import Dense, Packed
from fla_ops.common.cpu.sequences import is_traced
from fla_ops.validation import Size

BLOCK = 16  # chunks that are composed at once
LEVELS = 5  # of blocks


class Maps(NamedTuple):
    """One map for each chunk; the leading axes are lanes, heads and chunks."""

    decay: Tensor  # d [..., rows, 1, 1]
    left: Tensor  # L [..., rows, K, C]
    right: Tensor  # R [..., rows, C, K]
    added: Tensor  # A [..., rows, K, V]


def scan(layout: Dense | Packed, maps: Maps, initial: Tensor | None, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """S before each chunk [..., rows, K, V] and S after the last [N, ..., K, V]; `backwards` from the last chunk on."""
    if initial is None:
        lanes = layout.batch if isinstance(layout, Dense) else layout.empty.shape[0]
        shape = maps.added.shape
        initial = maps.added.new_zeros((lanes, *shape[1:-3], *shape[-2:]))
    if isinstance(layout, Packed) or is_traced(maps.added):
        return _tree(layout, maps, initial, backwards)
    states: list[Tensor] = []
    state = initial
    rows = maps.added.shape[-3]
    for row in reversed(range(rows)) if backwards else range(rows):
        states.append(state)
        decay, left, right, added = (x[..., row, :, :] for x in maps)
        state = torch.addcmul(added, decay, state) - left @ (right @ state)
    return torch.stack(states[::-1] if backwards else states, -3), state


def _tree(layout: Dense | Packed, maps: Maps, initial: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
    rows = maps.added.shape[-3]
    if isinstance(layout, Dense):
        row = torch.arange(rows, device=initial.device)
        begins = row == (rows - 1 if backwards else 0)
        entering = initial.unsqueeze(-3)
    else:
        begins = layout.last if backwards else layout.first
        entering = initial[layout.sequence].movedim(0, -3)[None]
    identity = torch.eye(maps.left.shape[-2], dtype=initial.dtype, device=initial.device)
    matrices = maps.decay * identity - maps.left @ maps.right
    first = begins[:, None, None]
    added = torch.where(first, matrices @ entering + maps.added, maps.added)
    turned = [x.flip(axis) for x, axis in ((matrices, -3), (added, -3), (begins, -1))] if backwards else None
    after = _compose(*(turned or (matrices, added, begins)))
    after = after.flip(-3) if backwards else after
    before = torch.where(first, entering, after.roll(-1 if backwards else 1, -3))
    if isinstance(layout, Dense):
        return before, after[..., 0 if backwards else -1, :, :]
    final = after[0][..., layout.first_row if backwards else layout.last_row, :, :].movedim(-3, 0)
    return before, torch.where(layout.empty.reshape(-1, *[1] * (final.dim() - 1)), initial, final)


def _compose(matrices: Tensor, added: Tensor, begins: Tensor, level: int = 1) -> Tensor:
    """S after each map of matrices [..., rows, K, K] and added [..., rows, K, V]; those of `begins` start from zero."""
    rows: Size = added.shape[-3]
    if level == 1:
        torch._check(rows <= BLOCK**LEVELS, lambda: f"a graph holds at most {BLOCK**LEVELS} chunks, got {rows}")
    blocks = (rows + BLOCK - 1) // BLOCK
    missing = blocks * BLOCK - rows
    shape = (blocks, BLOCK)
    matrices, added = (pad(x, (0, 0, 0, 0, 0, missing)).unflatten(-3, shape) for x in (matrices, added))
    begins = pad(begins, (0, missing)).unflatten(-1, shape)
    place = torch.arange(BLOCK, device=added.device)
    apart = 1
    while apart < BLOCK:
        composed = (~begins & (place >= apart))[..., None, None]
        added = torch.where(composed, matrices @ _later(added, apart) + added, added)
        matrices = torch.where(composed, matrices @ _later(matrices, apart), matrices)
        begins = begins | pad(begins[..., : BLOCK - apart], (apart, 0))
        apart *= 2
    if level < LEVELS and not (isinstance(rows, int) and rows <= BLOCK):
        ends = _compose(matrices[..., -1, :, :], added[..., -1, :, :], begins[..., -1], level + 1)
        entering = pad(ends, (0, 0, 0, 0, 1, 0))[..., :-1, :, :].unsqueeze(-3)
        added = torch.where(begins[..., None, None], added, matrices @ entering + added)
    after = added.flatten(-4, -3)
    if isinstance(rows, int):
        return after[..., :rows, :, :]
    # A slice would have min(rows, ...) rows, which a product compares with others: that guards on the length.
    return after.index_select(-3, torch.arange(rows, device=after.device))


def _later(x: Tensor, by: int) -> Tensor:
    """x [..., BLOCK, K, width] moved along its block, with zeros where nothing comes from."""
    return pad(x[..., : BLOCK - by, :, :], (0, 0, 0, 0, by, 0))
