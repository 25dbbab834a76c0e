"""Timing several contenders in one loop, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .machine import WATCH

SAMPLE = 2e-3  # seconds that one sample takes at least: fast calls are repeated within it
ROUNDS = (5, 60)  # at least and at most
SLOW_ROUNDS = 3  # of a contender that alone would use up the time
NOISY = 0.10  # the spread from which a row is called noisy


@dataclass
class Contender:
    """Something to time: `call(i)` works on the i-th of `sets` sets of inputs."""

    name: str
    call: Callable[[int], object]
    sets: int = 1
    samples: list[float] = field(default_factory=list)  # seconds for one call
    peak: int | None = None  # bytes that a call holds beyond its inputs

    @property
    def median(self) -> float:
        """Seconds for one call."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, relative to the median."""
        if len(self.samples) < 2:
            return math.inf
        low, middle, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / middle

    @property
    def noisy(self) -> bool:
        """Whether the samples differ too much for a small difference to mean anything."""
        return self.spread > NOISY

    def times_slower_than(self, other: Contender) -> float:
        """Median over the rounds that both ran in, of the ratio within a round."""
        return statistics.median(mine / its for mine, its in zip(self.samples, other.samples, strict=False))


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(contender: Contender, device: torch.device) -> float:
    """Compile, allocate and fill caches; the seconds of one call afterwards."""
    for i in range(2):
        contender.call(i % contender.sets)
    synchronise(device)
    start = time.perf_counter()
    contender.call(0)
    synchronise(device)
    return time.perf_counter() - start


def measure(contenders: Sequence[Contender], device: torch.device, seconds: float) -> None:
    """Fill in the samples: warm everything up, then go round the contenders, in alternating order, for `seconds`."""
    once = {c.name: max(warm_up(c, device), 1e-7) for c in contenders}
    starts = {c.name: n * c.sets // len(contenders) for n, c in enumerate(contenders)}  # no one follows on warm inputs
    repeats = {name: math.ceil(SAMPLE / t) for name, t in once.items()}
    slow = {name for name, t in once.items() if t > seconds / ROUNDS[0]}
    least, most = ROUNDS
    with _undisturbed(), WATCH.watching():
        end = time.perf_counter() + seconds
        for number in range(most):
            if number >= least and time.perf_counter() > end:
                break
            for c in contenders if number % 2 == 0 else reversed(contenders):
                if c.name not in slow or number < SLOW_ROUNDS:
                    c.samples.append(_sample(c, repeats[c.name], starts[c.name] + number * repeats[c.name], device))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection inside."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _sample(contender: Contender, repeats: int, first: int, device: torch.device) -> float:
    """Seconds for one call, averaged over `repeats` calls on successive sets of inputs from number `first` on.

    One call before them is not timed: what the contender before left to the caches and the allocator is not its own.
    """
    call, sets = contender.call, contender.sets
    order = [(first + i) % sets for i in range(repeats)]
    call((first - 1) % sets)
    synchronise(device)
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for i in order:
            call(i)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats
    start = time.perf_counter()
    for i in order:
        call(i)
    return (time.perf_counter() - start) / repeats


def peak_memory(contender: Contender, device: torch.device) -> int | None:
    """Bytes allocated at the fullest point of one call, beyond what was held before."""
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender.call(0)
        synchronise(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _silent_stderr(), torch.profiler.profile(profile_memory=True) as profiler:
        contender.call(0)
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's library announces itself on the file descriptor."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
