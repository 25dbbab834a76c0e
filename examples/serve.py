"""Serve requests to the language model of `make demo`: continuous batching, cached prefixes, drafted bytes.

    python examples/serve.py                                  200 requests, each answer compared with one made alone
    python examples/serve.py --sweep 1 2 4 8 16 32            bytes per second at so many sequences at once

Requests come at random. Some begin with a prompt that others share, some are cancelled, and some cannot be served.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cores  # noqa: F401 - before PyTorch
import torch
from drafting import Trigrams
from generation import greedy
from language_model import LanguageModel, ModelConfig
from pooled_model import Batch, Chosen, PooledModel
from report import Check
from scheduler import Limits, Request, RequestError, Scheduler
from text import Text, TextError, from_file, python_library
from torch import Tensor
from tqdm import tqdm
from training import CheckpointError, read_checkpoint

TOLERANCE = 1e-3  # of logits: two that are closer may change places when they are rounded in another order
SHARED = 4  # prompts that others begin with


@dataclass(frozen=True)
class Traffic:
    """Requests at random, out of a text."""

    requests: int
    prompt: int = 400  # bytes, at most
    length: int = 64  # bytes to write, at most
    shared: int = 192  # bytes of a prompt that others share
    cancelled: float = 0.02  # of all requests
    malformed: float = 0.02
    arrivals: float = 0.8  # for each call of the model, on average
    seed: int = 0

    def draw(self, text: Tensor) -> Iterator[list[tuple[object, int, bool]]]:
        """For each call, the requests that come before it: the prompt, the length, and whether it will be cancelled."""
        choose = random.Random(self.seed)
        beginnings = [self._excerpt(text, choose, self.shared) for _ in range(SHARED)]
        left = self.requests
        while left:
            coming = []
            while left and choose.random() < self.arrivals / (1 + self.arrivals):
                left -= 1
                coming.append(self._request(text, choose, beginnings))
            yield coming

    def _request(self, text: Tensor, choose: random.Random, beginnings: Sequence[bytes]) -> tuple[object, int, bool]:
        length = choose.randint(1, self.length)
        if choose.random() < self.malformed:
            return choose.choice([(b"", length, False), ("text", length, False), (b"prompt", -length, False)])
        beginning = choose.choice(beginnings) if choose.random() < 0.5 else b""
        prompt = beginning + self._excerpt(text, choose, choose.randint(1, self.prompt))
        return prompt, length, choose.random() < self.cancelled

    @staticmethod
    def _excerpt(text: Tensor, choose: random.Random, length: int) -> bytes:
        start = choose.randrange(len(text) - length)
        return bytes(text[start : start + length].tolist())


@dataclass
class Served:
    """What came of the traffic."""

    finished: list[Request]
    cancelled: int = 0
    refused: int = 0
    seconds: float = 0.0
    occupancy: float = 0.0  # of the sequences that a call may serve, those that it served

    @property
    def speed(self) -> float:
        """Bytes written per second."""
        return sum(r.length for r in self.finished) / self.seconds


class Compiled:
    """The model in one graph for all batches, or, without a backend, as it is."""

    def __init__(self, model: PooledModel, backend: str | Callable[..., object] | None = "inductor") -> None:
        self._run = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)

    def __call__(self, batch: Batch) -> Chosen:
        """Only the number of a sequence's tokens is a constant of the graph."""
        for x in batch:
            torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_static(batch.tokens, 1)
        return self._run(batch)


def serve(scheduler: Scheduler, traffic: Traffic, text: Tensor) -> Served:
    """Submit the traffic, and serve it to its end, with a line that shows how it goes."""
    served, doomed, choose = Served([]), [], random.Random(traffic.seed)
    coming, counts, most = iter(traffic.draw(text)), scheduler.counts, scheduler.limits.sequences
    begun = time.monotonic()
    with tqdm(total=traffic.requests, unit="request", mininterval=1 if sys.stderr.isatty() else 15) as bar:
        while (arrived := next(coming, None)) is not None or scheduler.busy:
            for prompt, length, cancelled in arrived or ():
                request = _submit(scheduler, prompt, length)
                served.refused += request is None
                doomed += [request] * (cancelled and request is not None)
            for request in [r for r in doomed if choose.random() < 0.1]:
                doomed.remove(request)
                served.cancelled += scheduler.cancel(request)
            if scheduler.busy:
                served.finished += scheduler.step()
            served.seconds = time.monotonic() - begun
            served.occupancy = counts["sequences"] / max(1, counts["calls"] * most)
            speed = counts["written"] / served.seconds
            bar.set_postfix_str(f"{speed:,.0f} bytes/s, {served.occupancy:.0%} occupied", refresh=False)
            bar.update(len(served.finished) + served.cancelled + served.refused - bar.n)
    return served


def _submit(scheduler: Scheduler, prompt: object, length: int) -> Request | None:
    try:
        return scheduler.submit(prompt, length)
    except RequestError:
        return None


def check_answers(model: LanguageModel, finished: Sequence[Request]) -> Check:
    """Every answer is the one that the model gives alone, byte by byte up to its own step; or a tie parts them."""
    different, ties = 0, 0
    for request in tqdm(finished, unit="answer", mininterval=1 if sys.stderr.isatty() else 15):
        alone, margins = greedy(model, request.prompt, request.length)
        if (found := request.answer) != alone:
            parted = next(i for i, (one, other) in enumerate(zip(found, alone, strict=True)) if one != other)
            ties += margins[parted] < TOLERANCE
            different += margins[parted] >= TOLERANCE
    equal = f"{len(finished) - different - ties} equal, {ties} part where two bytes' logits are within {TOLERANCE}"
    return Check("answers against those made alone", f"{equal}, {different} different", different == 0)


def check_rows(scheduler: Scheduler) -> Check:
    """When all is served, each row is free or holds a cached prefix."""
    rows = scheduler.rows
    held = sorted([*rows.free, *rows.cached.values()])
    found = f"{len(rows.free)} free, {len(rows.cached)} cached prefixes, of {scheduler.model.rows}"
    return Check("rows of the pool", found, held == list(range(scheduler.model.rows)))


def check_graphs() -> Check:
    """One graph served all batches."""
    found = torch._dynamo.utils.counters
    graphs, breaks = found["stats"]["unique_graphs"], sum(found["graph_break"].values())
    return Check("torch.compile(fullgraph=True)", f"{graphs} graph, {breaks} graph breaks", (graphs, breaks) == (1, 0))


def print_report(served: Served, scheduler: Scheduler, checks: Sequence[Check]) -> None:
    """The summary at the end."""
    counts, calls = scheduler.counts, max(1, scheduler.counts["calls"])
    each = f"{counts['stood'] / max(1, counts['verified']):.2f} for each sequence and call"
    print(f"\n{len(served.finished)} answered, {served.cancelled} cancelled, {served.refused} refused")
    print(f"prompts: {counts['read']:,} bytes read, {counts['cached']:,} came from cached prefixes")
    print(f"answers: {counts['written']:,} bytes, {served.speed:,.0f} a second, {each}")
    print(f"calls: {calls:,}, on average with {served.occupancy:.0%} of {scheduler.limits.sequences} sequences")
    print("\nchecks")
    for check in checks:
        print(f"  {'holds' if check.holds else 'FAILS'}  {check.name}: {check.found}")


def sweep(o: argparse.Namespace, model: LanguageModel, text: Text) -> None:
    """Bytes per second at several numbers of sequences, with and without drafts, when requests never run out."""
    pooled = PooledModel(model, max(o.sweep) + o.rows)
    run, trigrams, speeds = Compiled(pooled, o.backend), Trigrams(text.train), {}
    for sequences in sorted(o.sweep) * o.repeats:
        for drafts in (0, o.drafts):
            traffic = Traffic(max(16, 4 * sequences), cancelled=0, malformed=0, arrivals=1e9, seed=o.seed)
            scheduler = Scheduler(pooled, run, Limits(sequences), drafts, trigrams)
            scheduler.warm_up()
            served = serve(scheduler, traffic, text.held_out)
            stood = scheduler.counts["stood"] / scheduler.counts["verified"]
            before = speeds.get((sequences, drafts), (0.0,))
            speeds[sequences, drafts] = max(before, (served.speed, stood))
    print(f"\n| sequences at once | bytes/s | bytes/s with {o.drafts} drafted bytes | bytes a call and sequence |")
    print("|---:|---:|---:|---:|")
    for sequences in sorted(o.sweep):
        (plain, _), (drafted, stood) = speeds[sequences, 0], speeds[sequences, o.drafts]
        print(f"| {sequences} | {plain:,.0f} | {drafted:,.0f} | {stood:.2f} |")


def load(checkpoint: Path) -> LanguageModel:
    """The model that `make demo` left; without one, random weights."""
    torch.manual_seed(0)
    if not checkpoint.exists():
        print(f"no {checkpoint}: the weights are random, and the answers mean nothing (`make demo` trains)")
        return LanguageModel(ModelConfig()).eval()
    content = read_checkpoint(checkpoint)
    names = (name for name in content["identity"] if name.startswith("model."))
    model = LanguageModel(ModelConfig(**{name.removeprefix("model."): content["identity"][name] for name in names}))
    model.load_state_dict(content["model"])
    return model.eval()


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("out/checkpoint.pt"), metavar="FILE", help="default: %(default)s")
    add("--text", type=Path, metavar="FILE", help="prompts come from this file (default: Python's standard library)")
    add("--requests", type=int, default=200, metavar="N")
    add("--sequences", type=int, default=16, metavar="N", help="served at once (default: %(default)s)")
    add("--rows", type=int, default=64, metavar="N", help="of the pool, cached prefixes too (default: %(default)s)")
    add("--drafts", type=int, default=3, metavar="N", help="drafted bytes a sequence and call (default: %(default)s)")
    add("--arrivals", type=float, default=0.8, metavar="X", help="requests a call, on average (default: %(default)s)")
    add("--seed", type=int, default=0)
    add(
        "--eager", dest="backend", action="store_const", const=None, default="inductor", help="do not compile the model"
    )
    add("--sweep", type=int, nargs="+", metavar="N", help="only measure the speed at so many sequences at once")
    add("--repeats", type=int, default=3, help="of a measurement; the fastest counts (default: %(default)s)")
    return parser.parse_args()


def main(o: argparse.Namespace) -> int:
    """Serve, check, report. The exit status: 0 if every check holds."""
    text = python_library() if o.text is None else from_file(o.text)
    model = load(o.checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    if o.sweep:
        sweep(o, model, text)
        return 0
    pooled = PooledModel(model, o.rows)
    scheduler = Scheduler(pooled, Compiled(pooled, o.backend), Limits(o.sequences), o.drafts, Trigrams(text.train))
    traffic = Traffic(o.requests, arrivals=o.arrivals, seed=o.seed)
    if o.backend is not None:
        print("compiling the model ...", flush=True)
        scheduler.warm_up()
    served = serve(scheduler, traffic, text.held_out)
    print("making each answer alone ...", flush=True)
    checks = [check_answers(model, served.finished), check_rows(scheduler)]
    if o.backend is not None:
        checks.append(check_graphs())
    print_report(served, scheduler, checks)
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(options()))
    except (TextError, CheckpointError) as error:
        sys.exit(f"serve: {error}")
