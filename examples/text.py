"""The bytes to learn from, a part held out, and what simpler models reach on that part."""

from __future__ import annotations

import hashlib
import lzma
import sysconfig
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

SMALLEST = 64 * 1024  # bytes of text below which there is nothing to learn
HELD_OUT_FILES = 50  # of the library's files, one in so many is held out
LARGEST_HELD_OUT = 256 * 1024
LARGEST_CONTEXT = 64 * 1024 * 1024  # the window of `xz -9`: a longer training text would be forgotten in part
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class TextError(Exception):
    """The text cannot be used, and why."""


@dataclass(frozen=True)
class Text:
    """Two disjoint byte strings, as uint8 tensors."""

    name: str
    train: Tensor
    held_out: Tensor

    @property
    def digest(self) -> str:
        """What tells this text from another."""
        return hashlib.sha256(_bytes(self.train) + b"|" + _bytes(self.held_out)).hexdigest()[:16]


def python_library() -> Text:
    """The source text of Python's standard library, files in sorted order; a fixed choice of files is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(p.relative_to(root) for p in root.rglob("*.py"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name in names:
        if SKIPPED.isdisjoint(name.parts):
            held_out = zlib.crc32(name.as_posix().encode()) % HELD_OUT_FILES == 0
            parts[held_out].append((root / name).read_bytes())
    return _text(f"the Python standard library's source, {root}", b"".join(parts[False]), b"".join(parts[True]))


def from_file(path: Path) -> Text:
    """The bytes of one file; its last twentieth is held out."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TextError(f"cannot read the text {path}: {error.strerror}") from error
    cut = len(content) - min(len(content) // 20, LARGEST_HELD_OUT)
    return _text(str(path), content[:cut], content[cut:])


def _text(name: str, train: bytes, held_out: bytes) -> Text:
    if (size := len(train) + len(held_out)) < SMALLEST:
        raise TextError(f"{name} has {size:,} bytes; to train and to hold a part out takes at least {SMALLEST:,}")
    return Text(name, _tensor(train), _tensor(held_out[:LARGEST_HELD_OUT]))


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _bytes(content: Tensor) -> bytes:
    return content.numpy().tobytes()


def random_windows(text: Tensor, batch: int, time: int, seed: int) -> Tensor:
    """A batch of windows [batch, time + 1]; one seed, one batch, so a resumed run sees what it would have seen."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(len(text) - time, (batch, 1), generator=generator)
    return text[(start + torch.arange(time + 1)).to(text.device)].long()


def baselines(text: Text) -> dict[str, float]:
    """Bits per byte on the held-out text of byte counts (fitted on the training text) and of xz.

    "xz, after the training text" is what the held-out text adds to the compressed training text.
    """
    train, held_out = _bytes(text.train), _bytes(text.held_out)
    reach = _count_models(text)
    jobs = [held_out]
    if len(train) + len(held_out) <= LARGEST_CONTEXT:
        jobs += [train, train + held_out]
    stop = Event()
    with ThreadPoolExecutor() as pool:
        try:
            sizes = list(pool.map(lambda content: _xz(content, stop), jobs))
        finally:
            stop.set()  # an interrupt does not wait for the rest
    reach["xz"] = 8 * sizes[0] / len(held_out)
    if len(jobs) > 1:
        reach["xz, after the training text"] = 8 * (sizes[2] - sizes[1]) / len(held_out)
    return reach


def _xz(content: bytes, stop: Event, piece: int = 1 << 18) -> int:
    """The compressed size."""
    compressor, size = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME), 0
    for start in range(0, len(content), piece):
        if stop.is_set():
            break
        size += len(compressor.compress(content[start : start + piece]))
    return size + len(compressor.flush())


def _count_models(text: Text, weight: float = 8.0) -> dict[str, float]:
    """Counts of one byte, and of a byte after two, smoothed by `weight` imagined bytes from the shorter context."""
    bytes_, held_out = text.train.long(), torch.cat([torch.tensor([10, 10]), text.held_out.long()])
    before_last, last, byte = held_out[:-2], held_out[1:-1], held_out[2:]
    one = counts([bytes_])
    two = counts([bytes_[:-1], bytes_[1:]])
    three = counts([bytes_[:-2], bytes_[1:-1], bytes_[2:]])

    unigram = (one + 1) / (one.sum() + 256)
    bigram = (two + weight * unigram) / (two.sum(-1, keepdim=True) + weight)
    seen, context = three[before_last, last, byte], three.sum(-1)[before_last, last]
    trigram = (seen + weight * bigram[last, byte]) / (context + weight)
    return {"unigram counts": _bits(unigram[byte]), "trigram counts": _bits(trigram)}


def counts(columns: Sequence[Tensor]) -> Tensor:
    """How often each tuple of bytes occurs: [256] * len(columns)."""
    index = torch.zeros_like(columns[0])
    for column in columns:
        index = index * 256 + column
    return torch.bincount(index, minlength=256 ** len(columns)).view([256] * len(columns))


def _bits(probability: Tensor) -> float:
    return -probability.double().log2().mean().item()
