"""Training that can be stopped at any moment and resumed: the loop, its checkpoint, and what interrupts it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from language_model import LanguageModel, cross_entropy
from text import Text, random_windows
from torch import Tensor
from tqdm import tqdm

BITS = 1 / math.log(2)  # in one nat


@dataclass(frozen=True)
class TrainingConfig:
    """The hyper-parameters of a run; a checkpoint continues only with the same ones."""

    steps: int = 1600
    batch: int = 4
    time: int = 256  # bytes of one training window
    learning_rate: float = 3e-3
    warm_up: int = 50  # steps
    weight_decay: float = 0.1
    seed: int = 0


class CheckpointError(Exception):
    """The checkpoint cannot be continued, and why."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; no `except Exception` on the way may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


class Interrupts:
    """Turns SIGINT and SIGTERM into Interrupted, at once or, while `held`, right after."""

    def __init__(self) -> None:
        self._holding = False
        self._waiting: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._arrive)

    def _arrive(self, number: int, _frame: Any) -> None:
        if not self._holding:
            raise Interrupted(number)
        self._waiting = number

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What runs inside is not torn in two."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._waiting is not None:
            number, self._waiting = self._waiting, None
            raise Interrupted(number)


@dataclass
class Run:
    """A model in training: everything that the checkpoint holds."""

    model: LanguageModel
    config: TrainingConfig
    text: Text
    optimizer: torch.optim.Optimizer = field(init=False)
    step: int = 0
    seconds: float = 0.0  # spent training, over all sessions
    finished: bool = False
    losses: list[float] = field(default_factory=list)  # bits per byte of each step

    def __post_init__(self) -> None:
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.95), fused=True)

    def identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be continued."""
        model = {f"model.{name}": value for name, value in asdict(self.model.config).items()}
        training = {f"training.{name}": value for name, value in asdict(self.config).items()}
        return {**model, **training, "text": self.text.digest}

    def save(self, path: Path) -> None:
        """Write a checkpoint; a reader, or a crash, sees the old file or the new one, never a part."""
        content = {
            "identity": self.identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "finished": self.finished,
            "losses": self.losses,
        }
        draft = path.with_name(path.name + ".draft")
        with draft.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same hyper-parameters and text."""
        content = read_checkpoint(path, next(self.model.parameters()).device)
        mine, theirs = self.identity(), content.get("identity", {})
        names = [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]
        if names:
            differences = "; ".join(f"{name}: {theirs.get(name)} there, {mine.get(name)} here" for name in names)
            raise CheckpointError(
                f"{path} belongs to another run ({differences}). Give the options of that run, "
                "another folder with --out, or --fresh to start over."
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.seconds = content["step"], content["seconds"]
        self.finished, self.losses = content["finished"], content["losses"]


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The dictionary in a checkpoint file, or in a file that holds only a state-dict."""
    try:
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return content


def initialise(model: LanguageModel, path: Path) -> None:
    """Take the weights from a state-dict, or from the one in a checkpoint."""
    content = read_checkpoint(path, next(model.parameters()).device)
    try:
        model.load_state_dict(content.get("model", content))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model {model.config}: {error}") from error


@dataclass(frozen=True)
class Compilation:
    """What torch.compile did during a session of training."""

    seconds: float
    graphs: int
    graph_breaks: int
    recompiles: int


def train(run: Run, path: Path, interrupts: Interrupts, minutes: float) -> Compilation:
    """Train to the run's last step, or for `minutes` in all; the learning rate falls to its end either way.

    A checkpoint is left at `path` however this ends: it is written every 30 seconds, when interrupted, and at the end.
    """
    try:
        return _train(run, path, interrupts, minutes)
    finally:
        with interrupts.held():
            run.save(path)


def _train(run: Run, path: Path, interrupts: Interrupts, minutes: float) -> Compilation:
    c, device = run.config, next(run.model.parameters()).device
    text = run.text.train.to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def loss_of(tokens: Tensor) -> Tensor:
        with autocast:
            return cross_entropy(run.model, tokens)

    if device.type == "cpu":  # two runs give the same weights: the embedding's gradient is not summed by atomics
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    compiled = torch.compile(loss_of, fullgraph=True)
    seconds = _compile(compiled, run, random_windows(text, c.batch, c.time, c.seed))
    begun = saved = time.monotonic()
    before = run.seconds
    with tqdm(total=c.steps, initial=run.step, unit="step", mininterval=1 if sys.stderr.isatty() else 15) as bar:
        while not run.finished:
            for group in run.optimizer.param_groups:
                group["lr"] = c.learning_rate * _schedule(run, minutes)
            loss = compiled(random_windows(text, c.batch, c.time, c.seed * 1_000_003 + run.step))
            run.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            with interrupts.held():
                run.optimizer.step()
                run.losses.append(loss.item() * BITS)
                run.step += 1
                run.seconds = before + time.monotonic() - begun
                run.finished = run.step >= c.steps or run.seconds >= 60 * minutes
                if time.monotonic() - saved > 30:
                    run.save(path)
                    saved = time.monotonic()
            speed = (run.step - bar.initial) * c.batch * c.time / (time.monotonic() - begun)
            recent = run.losses[-20:]
            bar.set_postfix_str(f"{sum(recent) / len(recent):.3f} bits/byte, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
    return _compilation(seconds)


def _compile(compiled: Callable[[Tensor], Tensor], run: Run, tokens: Tensor) -> float:
    """Compile forward and backward by a call whose gradients are dropped; the seconds it took."""
    torch._dynamo.utils.counters.clear()
    print("compiling the training step ...", flush=True)
    started = time.monotonic()
    compiled(tokens).backward()
    run.optimizer.zero_grad()
    return time.monotonic() - started


def _compilation(seconds: float) -> Compilation:
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    return Compilation(seconds, graphs, sum(counters["graph_break"].values()), graphs - 1)


def _schedule(run: Run, minutes: float) -> float:
    """The factor of the learning rate: a warm-up, then half a cosine from 1 to 0.05.

    It follows the steps, or the clock where that will end the run first. The clock's first tenth does not count: a slow
    start changes nothing.
    """
    clock = (run.seconds / (60 * minutes) - 0.1) / 0.9
    progress = min(max(run.step / run.config.steps, clock), 1.0)
    warm_up = min((run.step + 1) / run.config.warm_up, 1.0)
    return warm_up * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
