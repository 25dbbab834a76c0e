"""The server of the examples: whatever comes together, every answer is the one that the model gives alone."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

ROOT = Path(__file__).parents[1]
SIZES = {"width": 24, "layers": 2, "heads": 3, "key_width": 6, "value_width": 10, "hidden": 20}


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The command's module; it and those beside it are forgotten afterwards."""
    folder = ROOT / "examples"
    names = [path.stem for path in folder.glob("*.py")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "passive"))
        patch.syspath_prepend(str(folder))
        yield import_module("serve")
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model(example: ModuleType) -> torch.nn.Module:
    """A small model with random weights."""
    torch.manual_seed(0)
    return example.LanguageModel(example.ModelConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def text(example: ModuleType, model: torch.nn.Module) -> torch.Tensor:
    """What the model writes after bytes at random, so that its trigrams are often right."""
    written = b"".join(example.greedy(model, bytes([65 + i, 97 + i]), 60)[0] for i in range(26))
    return torch.frombuffer(bytearray(written), dtype=torch.uint8)


def scheduler_of(
    example: ModuleType,
    model: torch.nn.Module,
    text: torch.Tensor,
    drafts: int = 3,
    rows: int = 9,
    backend: object = None,
) -> object:
    """Up to five sequences at once."""
    pooled = example.PooledModel(model, rows)
    run = example.Compiled(pooled, backend)
    return example.Scheduler(pooled, run, example.Limits(5, 128), drafts, example.Trigrams(text))


@pytest.mark.parametrize("rows", [5, 40], ids=["a-row-for-each-sequence", "rows-for-prefixes"])
@pytest.mark.parametrize("drafts", [0, 3], ids=["no-drafts", "three-drafts"])
def test_answers_are_those_made_alone(
    example: ModuleType, model: torch.nn.Module, text: torch.Tensor, drafts: int, rows: int
) -> None:
    scheduler = scheduler_of(example, model, text, drafts, rows)
    traffic = example.Traffic(40, prompt=100, length=20, shared=130, cancelled=0.4, malformed=0.1)
    served = example.serve(scheduler, traffic, text)
    assert served.refused
    assert served.cancelled
    assert len(served.finished) + served.cancelled + served.refused == traffic.requests
    for check in (example.check_answers(model, served.finished), example.check_rows(scheduler)):
        assert check.holds, check.found
    assert (scheduler.counts["stood"] > scheduler.counts["verified"]) == (drafts > 0)
    assert scheduler.counts["cached"]


def test_one_graph_serves_every_batch(example: ModuleType, model: torch.nn.Module, text: torch.Tensor) -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    scheduler = scheduler_of(example, model, text, backend=backend)
    scheduler.warm_up()
    served = example.serve(scheduler, example.Traffic(20, prompt=100, length=20), text)
    assert backend.frame_count == 1
    check = example.check_answers(model, served.finished)
    assert check.holds, check.found


def test_a_cached_prefix_is_not_read_again(example: ModuleType, model: torch.nn.Module, text: torch.Tensor) -> None:
    scheduler = scheduler_of(example, model, text)
    prompt = bytes(text[:150].tolist())
    answers = []
    for _ in range(2):
        request = scheduler.submit(prompt, 12)
        while scheduler.busy:
            scheduler.step()
        answers.append(request.answer)
    assert scheduler.counts["read"] == 150 + 150 - 128
    assert answers[0] == answers[1]


@pytest.mark.usefixtures("example")
def test_a_prefix_gives_way_to_sequences() -> None:
    rows = import_module("scheduler").Rows(2)
    assert rows.keep(b"first") is not None
    assert rows.keep(b"second") is not None
    assert rows.keep(b"second") is None
    assert rows.longest(b"first, again", 5)[0] == 5
    taken = rows.take()
    assert list(rows.cached) == [b"first"]
    assert rows.keep(b"third") == rows.cached[b"third"] != taken
    assert list(rows.cached) == [b"third"]
    rows.take()
    assert rows.keep(b"fourth") is None


@pytest.mark.parametrize(
    ("prompt", "length", "message"),
    [
        pytest.param(b"", 3, "1 to 4096 bytes, got 0", id="empty"),
        pytest.param(bytes(4097), 3, "1 to 4096 bytes, got 4097", id="too-long"),
        pytest.param("text", 3, "1 to 4096 bytes, got str", id="no-bytes"),
        pytest.param(b"x", 0, "positive number of bytes, got 0", id="nothing-to-write"),
    ],
)
def test_what_cannot_be_served_is_refused(
    example: ModuleType, model: torch.nn.Module, text: torch.Tensor, prompt: object, length: int, message: str
) -> None:
    scheduler = scheduler_of(example, model, text)
    with pytest.raises(example.RequestError, match=message):
        scheduler.submit(prompt, length)
    assert not scheduler.busy


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_thousands_of_requests_leave_nothing_behind(
    example: ModuleType, model: torch.nn.Module, text: torch.Tensor
) -> None:
    """Requests of all kinds; afterwards every row is free or cached, and memory is what it was after the first."""
    scheduler = scheduler_of(example, model, text, rows=24)
    held, tensors = [], []
    for seed in range(6):
        traffic = example.Traffic(600, prompt=150, length=24, shared=130, cancelled=0.2, malformed=0.1, seed=seed)
        served = example.serve(scheduler, traffic, text)
        assert not scheduler.busy
        for check in (example.check_answers(model, served.finished[::12]), example.check_rows(scheduler)):
            assert check.holds, check.found
        del served
        gc.collect()
        held.append(resident())
        tensors.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert len(set(tensors[1:])) == 1
    assert max(held[1:]) - held[1] < 8 << 20


@pytest.mark.slow
def test_the_command() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "examples/serve.py", "--requests", "12", "--checkpoint", "no-such-file"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 equal, 0 part" in done.stdout
    assert "1 graph, 0 graph breaks" in done.stdout
