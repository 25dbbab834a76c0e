"""A small model under DDP, FSDP2, tensor and sequence parallelism, eager and compiled: gradients are one process's."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fla_ops
from fla_ops.distributed import along
from tests import numerics
from tests.distributed import comparing
from tests.distributed.pool import Pool

WIDTH, H, HK, K, V = 24, 4, 2, 6, 8
BATCH, TIME = 4, 12


class Mixer(nn.Module):
    """simple_gla between projections of their own, so that each may be sharded by heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(WIDTH, HK * K, bias=False) for _ in range(2))
        self.v, self.g = nn.Linear(WIDTH, H * V, bias=False), nn.Linear(WIDTH, H)
        self.o = nn.Linear(H * V, WIDTH, bias=False)
        self.operator: Callable[..., Any] = fla_ops.chunk_simple_gla

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]; DTensor has no gradient of logsigmoid, so the gates are softplus."""
        q, k = (f(x).unflatten(-1, (-1, K)) for f in (self.q, self.k))
        v, g = self.v(x).unflatten(-1, (-1, V)), -F.softplus(-self.g(x))
        return self.o(self.operator(q, k, v, g)[0].flatten(-2))


class Model(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(Mixer() for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return x


def losses() -> tuple[Model, Model, Tensor, Tensor]:
    """A model with its gradients of one process, the same model without them, a batch, its outputs."""
    torch.manual_seed(0)
    one = Model().double()
    model, x = copy.deepcopy(one), torch.randn(BATCH, TIME, WIDTH, dtype=torch.float64)
    y = one(x)
    y.square().mean().backward()
    return one, model, x, y


def check(model: nn.Module, one: nn.Module) -> None:
    """Every gradient."""
    for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
        gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert gradient is not None, name
        numerics.close(gradient, q.grad)


def data_parallel(how: str) -> None:
    """Each rank has half of the batch; the gradients are averages over the ranks."""
    one, model, x, y = losses()
    if how == "ddp":
        wide: nn.Module = DistributedDataParallel(model)
    else:
        for mixer in model.mixers:
            fully_shard(mixer, mesh=comparing.mesh_of(2))
        wide = fully_shard(model, mesh=comparing.mesh_of(2))
    mine = x.chunk(2)[dist.get_rank()]
    out = wide(mine)
    numerics.close(out, y.chunk(2)[dist.get_rank()])
    out.square().mean().backward()
    check(model, one)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_data_parallel(pair: Pool, how: str) -> None:
    pair.run(data_parallel, how)


def tensor_parallel(compiled: bool) -> None:
    """Each rank has half of the heads; `fla_ops` sees DTensors, and the model knows nothing of it."""
    one, model, x, y = losses()
    plan = {name: ColwiseParallel(use_local_output=False) for name in "qkvg"} | {"o": RowwiseParallel()}
    for mixer in model.mixers:
        parallelize_module(mixer, comparing.mesh_of(2), plan)
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    out = run(x)
    numerics.close(out, y)
    out.square().mean().backward()
    check(model, one)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_tensor_parallel(pair: Pool, compiled: bool) -> None:
    pair.run(tensor_parallel, compiled)


def sequence_parallel() -> None:
    """Each rank has half of the steps, and FSDP2 averages the gradients over the same ranks."""
    one, model, x, y = losses()
    mesh = comparing.mesh_of(2)
    for mixer in model.mixers:
        mixer.operator = along(mesh)(fla_ops.chunk_simple_gla)
        fully_shard(mixer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    out = model(x.chunk(2, 1)[dist.get_rank()])
    numerics.close(out, y.chunk(2, 1)[dist.get_rank()])
    out.square().mean().backward()
    check(model, one)


def test_sequence_parallel(pair: Pool) -> None:
    pair.run(sequence_parallel)


@pytest.mark.slow
def test_the_example_agrees_with_one_process() -> None:
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "examples/train_distributed.py", "--steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the losses agree" in done.stdout
