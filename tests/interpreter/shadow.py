"""What is known about each element of a storage: whether it was ever written, and who touched it in this launch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

SEVERAL = -1  # as a reader: more than one program


class Shadow:
    """Elements are counted in the size of those of the first tensor that was seen on the storage."""

    def __init__(self, tensor: Tensor, written: bool) -> None:
        self._storage = tensor.untyped_storage()  # kept, so that its address is not given out again
        self._itemsize = tensor.itemsize
        self._written = np.full(self._storage.nbytes() // self._itemsize, written)
        self._masks: dict[tuple[object, ...], np.ndarray | None] = {}
        self.begin_launch()

    @property
    def address(self) -> int:
        """Where the storage lies."""
        return self._storage.data_ptr()

    def begin_launch(self) -> None:
        """Forget which programs touched what."""
        self._touched: np.ndarray | None = None

    def belongs(self, tensor: Tensor, elements: np.ndarray) -> np.ndarray:
        """Which of these elements of the storage are the tensor's."""
        inside = (elements >= 0) & (elements < len(self._written))
        mask = self._mask(tensor)
        if mask is not None:
            inside[inside] = mask[elements[inside]]
        return inside

    def mark_written(self, tensor: Tensor) -> None:
        """The host wrote all of it."""
        mask = self._mask(tensor)
        self._written[slice(None) if mask is None else mask] = True

    def unwritten(self, tensor: Tensor) -> int:
        """How many of its elements nothing wrote."""
        mask = self._mask(tensor)
        return int((~self._written if mask is None else mask & ~self._written).sum())

    def load(self, elements: np.ndarray, program: int, barriers: int) -> Iterator[tuple[str, str, int]]:
        """A program (numbered from 1), after so many barriers, loads: what is wrong with that, and for how many."""
        writer, reader, wrote, read = self._programs()
        before = writer[elements]
        if before.any():
            yield from _some("race", "loaded where another program stores", (before != 0) & (before != program))
            own = (before == program) & (wrote[elements] == barriers)
            yield from _some("order", "loaded after the program's own store", own)
        yield from _some("uninitialised", "loaded before anything was written", ~self._written[elements])
        others = reader[elements]
        reader[elements] = np.where((others == 0) | (others == program), program, SEVERAL)
        read[elements] = barriers

    def store(self, elements: np.ndarray, program: int, barriers: int, shared: bool) -> Iterator[tuple[str, str, int]]:
        """The same for a store; `shared` if several threads hold an element of the stored tile."""
        writer, reader, wrote, read = self._programs()
        before, others = writer[elements], reader[elements]
        if before.any():
            yield from _some("race", "stored where another program stores", (before != 0) & (before != program))
            own = (before == program) & (wrote[elements] == barriers)
            yield from _some("order", "stored after the program's own store", own)
        if others.any():
            yield from _some("race", "stored where another program loads", (others != 0) & (others != program))
            own = (others == program) & (read[elements] == barriers) & shared
            yield from _some("in-place", "stored where several threads load", own)
        writer[elements], wrote[elements] = program, barriers
        self._written[elements] = True

    def _programs(self) -> np.ndarray:
        """Who wrote and read an element last, and after how many barriers."""
        if self._touched is None:
            self._touched = np.zeros((4, len(self._written)), np.int32)
        return self._touched

    def _mask(self, tensor: Tensor) -> np.ndarray | None:
        """Which elements of the storage a tensor names; None for all."""
        if tensor.itemsize != self._itemsize:
            raise AssertionError(f"a storage of elements of {self._itemsize} bytes is read as {tensor.dtype}")
        if tensor.numel() == len(self._written) and tensor.is_contiguous():
            return None
        key = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        if key not in self._masks:
            named = torch.zeros(len(self._written), dtype=torch.bool)
            named.as_strided(*key).fill_(True)
            self._masks[key] = named.numpy()
        return self._masks[key]


def _some(kind: str, what: str, wrong: np.ndarray) -> Iterator[tuple[str, str, int]]:
    count = int(wrong.sum())
    if count:
        yield kind, what, count
