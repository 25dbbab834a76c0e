"""The blocks of docs/distributed.md run on two processes, and its formulas of bytes and time say what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

import fla_ops
from tests.distributed.pool import Pool
from tests.numerics import close

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run(program: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(program, str(PAGE), "exec"), names)
    return names


def on_ranks() -> None:
    """All blocks but the one of seconds."""
    dtensors, _, plain, checkpointing = blocks()
    names = run(dtensors, {})
    o, state, q = names["o"], names["state"], names["q"]
    assert (o.placements, state.placements, q.grad.placements) == ((Shard(1),), (Replicate(),), (Shard(1),))
    whole = [names[name].detach().full_tensor() for name in "qkvg"]
    expected, final = fla_ops.simple_gla(*whole, output_final_state=True)
    close(o.detach().full_tensor(), expected)
    close(state.detach().full_tensor(), final)
    run(plain, names)
    assert [x.shape[1] for x in names["outputs"]] == [16, 24]
    run(checkpointing, names)
    close(names["o"], names["outputs"][0])


def test_blocks(pair: Pool) -> None:
    pair.run(on_ranks)


def test_seconds() -> None:
    """An all-gather is as good as two all-to-alls on few ranks, and never beyond the number at which it ends."""
    seconds = run(blocks()[1], {"torch": torch})["seconds"]
    small = 4 * 4 * (64 * 64 + 1)
    assert seconds(4, small)[0] <= seconds(4, small)[1]
    for state in (small, 4 * 32 * (128 * 128 + 1)):
        gathered, transposed = seconds(65, state)
        assert gathered > transposed
