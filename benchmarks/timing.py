"""Time implementations alternately in one loop, so that whatever else the machine does slows all of them."""

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

from .machine import OTHER_LOAD

SAMPLE = 2e-3  # seconds that one sample takes at least: a fast call is repeated within it
ROUNDS = (5, 60)  # at least and at most
SLOW_ROUNDS = 3  # for an implementation that alone would use up the time
NOISY = 0.10  # the dispersion above which a row is called noisy


@dataclass
class Implementation:
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
    def dispersion(self) -> float | None:
        """The interquartile range, relative to the median; None for a single sample."""
        if len(self.samples) < 2:
            return None
        low, middle, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / middle

    def times_slower_than(self, other: Implementation) -> float:
        """The median of the ratios of both times within each round in which both ran."""
        return statistics.median(mine / its for mine, its in zip(self.samples, other.samples, strict=False))


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(implementation: Implementation, device: torch.device) -> float:
    """Compile, allocate and fill caches; return the seconds of one call afterwards."""
    for i in range(2):
        implementation.call(i % implementation.sets)
    synchronise(device)
    start = time.perf_counter()
    implementation.call(0)
    synchronise(device)
    return time.perf_counter() - start


def measure(implementations: Sequence[Implementation], device: torch.device, seconds: float) -> None:
    """Warm everything up, then take samples of each implementation in turn, in alternating order, for `seconds`."""
    once = {x.name: max(warm_up(x, device), 1e-7) for x in implementations}
    count = len(implementations)
    starts = {x.name: n * x.sets // count for n, x in enumerate(implementations)}  # none finds its inputs in a cache
    repeats = {name: math.ceil(SAMPLE / t) for name, t in once.items()}
    slow = {name for name, t in once.items() if t > seconds / ROUNDS[0]}
    least, most = ROUNDS
    with _no_garbage_collection(), OTHER_LOAD.watching():
        end = time.perf_counter() + seconds
        for number in range(most):
            if number >= least and time.perf_counter() > end:
                break
            for x in implementations if number % 2 == 0 else reversed(implementations):
                if x.name not in slow or number < SLOW_ROUNDS:
                    x.samples.append(_sample(x, repeats[x.name], starts[x.name] + number * repeats[x.name], device))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect garbage before, and not while something is timed."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _sample(implementation: Implementation, repeats: int, first: int, device: torch.device) -> float:
    """Average the seconds of one call over `repeats` calls on successive sets of inputs from number `first` on.

    One call before them is not timed, because the implementation before left its own data in the caches and its own
    blocks in the allocator.
    """
    call, sets = implementation.call, implementation.sets
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


def peak_memory(implementation: Implementation, device: torch.device) -> int:
    """Count the bytes allocated at the fullest point of one call, beyond what was held before."""
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        implementation.call(0)
        synchronise(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _silent_stderr(), torch.profiler.profile(profile_memory=True) as profiler:
        implementation.call(0)
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Redirect file descriptor 2, on which the profiler's library announces itself."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
