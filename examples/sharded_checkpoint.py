"""Checkpoints that every rank writes its part of, and that any other mesh can read."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def save(folder: Path, step: int, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Write `step-N`. It has that name only once it is whole; the ones before it go then."""
    draft, done = folder / f"draft-{step}", folder / f"step-{step}"
    weights, moments = get_state_dict(model, optimiser)
    dcp.save({"model": weights, "optimiser": moments}, checkpoint_id=draft)
    if dist.get_rank() == 0:
        draft.replace(done)
        for old in (*folder.glob("step-*"), *folder.glob("draft-*")):
            if old != done:
                shutil.rmtree(old)
    dist.barrier()


def load(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Take up the newest checkpoint, written on whatever mesh; its step, or 0 where there is none."""
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]
    if not steps:
        return 0
    weights, moments = get_state_dict(model, optimiser)
    dcp.load({"model": weights, "optimiser": moments}, checkpoint_id=folder / f"step-{max(steps)}")
    set_state_dict(model, optimiser, model_state_dict=weights, optim_state_dict=moments)
    return max(steps)
