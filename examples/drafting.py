"""Drafted bytes, for next to nothing: what most often followed the last two bytes in a text."""

from __future__ import annotations

import torch
from text import counts
from torch import Tensor


class Trigrams:
    """The most frequent byte after every two bytes."""

    def __init__(self, text: Tensor) -> None:
        text = text.long()
        self._after = counts([text[:-2], text[1:-1], text[2:]]).argmax(-1).flatten().to(torch.uint8).numpy().tobytes()

    def draft(self, text: bytearray, number: int) -> list[int]:
        """So many bytes after a text."""
        before, last = text[-2:].rjust(2)
        drafted = []
        for _ in range(number):
            before, last = last, self._after[before * 256 + last]
            drafted.append(last)
        return drafted
