"""Continuous batching: which sequences a call serves, which rows of the pools they have, and what is cached.

Requests wait until a row is free. A prompt is read in pieces that end at multiples of `boundary` bytes, where a copy of
its row is kept: a later prompt that begins likewise starts from there. Rows that nobody needs hold such copies, and the
one that was used longest ago gives way. Between pieces of prompts, every sequence that has read its prompt is written.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from drafting import Trigrams
from pooled_model import Batch, Chosen, PooledModel

LEAST = 2  # sequences of each kind in a batch: a graph for one alone would be a graph of its own


class RequestError(ValueError):
    """The request cannot be served, and why."""


@dataclass(eq=False)
class Request:
    """A prompt, and how many bytes are to follow it."""

    prompt: bytes
    length: int
    text: bytearray = field(default_factory=bytearray)  # the prompt and what was written
    row: int | None = None  # of the pools, while it is served
    read: int = 0  # bytes of the prompt that the row stands for

    @property
    def answer(self) -> bytes:
        """What was written so far."""
        return bytes(self.text[len(self.prompt) :])

    @property
    def finished(self) -> bool:
        """Whether all of it was written."""
        return len(self.text) >= len(self.prompt) + self.length


class Rows:
    """The rows of the pools: free ones, those of cached prefixes, and those that sequences hold."""

    def __init__(self, count: int) -> None:
        self.free = list(range(count))
        self.cached: OrderedDict[bytes, int] = OrderedDict()  # the one that was used longest ago first

    def __len__(self) -> int:
        """How many can be had."""
        return len(self.free) + len(self.cached)

    def take(self) -> int:
        """A free row, or else that of a cached prefix, which is forgotten."""
        return self.free.pop() if self.free else self.cached.popitem(last=False)[1]

    def give(self, row: int) -> None:
        """A row that its sequence no longer needs."""
        self.free.append(row)

    def keep(self, prefix: bytes) -> int | None:
        """A row for a copy of what stands for this prefix; None if there is one, or if all rows are taken."""
        if prefix in self.cached:
            self.cached.move_to_end(prefix)
        elif len(self):
            row = self.cached[prefix] = self.take()
            return row
        return None

    def longest(self, prompt: bytes, boundary: int) -> tuple[int, int | None]:
        """The longest cached prefix that leaves a byte to read: its length, and its row."""
        for length in range((len(prompt) - 1) // boundary * boundary, 0, -boundary):
            if (row := self.cached.get(prompt[:length])) is not None:
                self.cached.move_to_end(prompt[:length])
                return length, row
        return 0, None


@dataclass(frozen=True)
class Limits:
    """How much is served at once."""

    sequences: int = 16  # at once
    pieces: int = 256  # bytes of prompts in one call
    boundary: int = 64  # bytes from one cached prefix to the next; a multiple of the operator's chunk, so bits stay
    prompt: int = 4096  # bytes of a prompt


class Scheduler:
    """Serves requests: `submit` them, and `step` as long as it is `busy`."""

    def __init__(
        self, model: PooledModel, run: Callable[[Batch], Chosen], limits: Limits, drafts: int, trigrams: Trigrams
    ) -> None:
        if model.rows < limits.sequences:
            raise ValueError(f"{limits.sequences} sequences at once need as many rows, got {model.rows}")
        if limits.pieces < limits.boundary:
            raise ValueError(f"a call must have room for {limits.boundary} bytes of prompts, got {limits.pieces}")
        self.model, self.run, self.limits = model, run, limits
        self.drafts, self.trigrams = drafts, trigrams
        self.rows = Rows(model.rows)
        self.waiting: deque[Request] = deque()
        self.served: list[Request] = []  # in the order of their arrival
        self.counts: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.served)

    def submit(self, prompt: bytes, length: int) -> Request:
        """A new request, which waits for its turn."""
        if not isinstance(prompt, bytes) or not 1 <= len(prompt) <= self.limits.prompt:
            raise RequestError(f"a prompt must be 1 to {self.limits.prompt} bytes, got {_described(prompt)}")
        if not isinstance(length, int) or length < 1:
            raise RequestError(f"length must be a positive number of bytes, got {length!r}")
        request = Request(prompt, length, bytearray(prompt))
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> bool:
        """Forget a request, wherever it is. False if it is finished, or was forgotten before."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.served:
            self._leave(request)
        else:
            return False
        return True

    @torch.no_grad()
    def warm_up(self) -> None:
        """A call of nothing but padding, which compiles what all calls run."""
        self.run(self._batch([], []))

    @torch.no_grad()
    def step(self) -> list[Request]:
        """One call of the model; returns the requests that it finished."""
        self._admit()
        pieces = list(self._pieces())
        writing = [r for r in self.served if r.read == len(r.prompt)]
        batch = self._batch(pieces, writing)
        chosen = Chosen(*(x.tolist() for x in self.run(batch)))
        self.counts.update(calls=1, sequences=len(pieces) + len(writing))
        for request, following, accepted in zip(writing, chosen.after_tokens, chosen.accepted, strict=False):
            self._write(request, following[:accepted])
            self.counts.update(verified=1, stood=accepted)
        for (request, end), byte in zip(pieces, chosen.after_pieces, strict=False):
            self._read(request, end, byte)
        finished = [r for r in self.served if r.finished]
        for request in finished:
            self._leave(request)
        return finished

    def _admit(self) -> None:
        """Give rows to waiting requests, with what is cached of their prompts."""
        while self.waiting and len(self.served) < self.limits.sequences and len(self.rows):
            request = self.waiting.popleft()
            request.read, cached = self.rows.longest(request.prompt, self.limits.boundary)
            request.row = self.rows.take()  # may be the cached prefix's own, if no other row is left
            if cached not in (None, request.row):
                self.model.copy_row(cached, request.row)
            self.served.append(request)
            self.counts["cached"] += request.read

    def _pieces(self) -> Iterator[tuple[Request, int]]:
        """Requests that read a piece of their prompt now, and where it ends."""
        left, boundary = self.limits.pieces, self.limits.boundary
        for request in self.served:
            end = min(len(request.prompt), (request.read // boundary + 1) * boundary)
            if 0 < end - request.read <= left:
                left -= end - request.read
                yield request, end

    def _batch(self, pieces: list[tuple[Request, int]], writing: list[Request]) -> Batch:
        """Both kinds of sequences, filled up with padding: pieces with one of two bytes, so that there is one."""
        missing = max(1, LEAST - len(pieces))
        cut = [request.prompt[request.read : end] for request, end in pieces]
        cut += [bytes(2)] * missing
        tokens = [[r.text[-1], *self.trigrams.draft(r.text, self.drafts)] for r in writing]
        rows = [r.row for r in writing]
        while len(rows) < LEAST:
            tokens.append([0] * (1 + self.drafts))
            rows.append(-1)
        fields = (
            list(b"".join(cut)),
            [0, *accumulate(map(len, cut))],
            [r.row for r, _ in pieces] + [-1] * missing,
            [r.read == 0 for r, _ in pieces] + [True] * missing,
            tokens,
            rows,
        )
        return Batch(*(torch.tensor(x, device=self.model.device) for x in fields))

    def _read(self, request: Request, end: int, byte: int) -> None:
        """A request has read its prompt up to `end`, and `byte` would follow."""
        self.counts["read"] += end - request.read
        request.read = end
        if end % self.limits.boundary == 0 and (row := self.rows.keep(request.prompt[:end])) is not None:
            self.model.copy_row(request.row, row)
        if end == len(request.prompt):
            self._write(request, [byte])

    def _write(self, request: Request, following: list[int]) -> None:
        left = len(request.prompt) + request.length - len(request.text)
        request.text += bytes(following[:left])
        self.counts["written"] += min(left, len(following))

    def _leave(self, request: Request) -> None:
        self.served.remove(request)
        self.rows.give(request.row)
        request.row = None


def _described(prompt: object) -> str:
    return f"{len(prompt)}" if isinstance(prompt, bytes) else type(prompt).__name__
