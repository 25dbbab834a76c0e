"""A small model under DDP, FSDP2, tensor, sequence and pipeline parallelism: gradients are those of one process."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import create_selective_checkpoint_contexts

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


def pipeline() -> None:
    """Each rank has one of the layers; microbatches go from one to the next, and gradients back."""
    one, model, x, y = losses()
    rank = dist.get_rank()

    def layer(x: Tensor) -> Tensor:
        return x + model.mixers[rank](model.norms[rank](x))

    part = nn.Module()
    part.mixer, part.norm, part.forward = model.mixers[rank], model.norms[rank], layer
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda out, _: out.square().mean())
    if rank == 0:
        schedule.step(x)
    else:
        numerics.close(schedule.step(target=x), y)
    check(model.mixers[rank], one.mixers[rank])
    check(model.norms[rank], one.norms[rank])


def test_pipeline_parallel(pair: Pool) -> None:
    pair.run(pipeline)


def recomputed() -> None:
    """Half of the batch each, parameters sharded by FSDP2, a backward pass that recomputes all but the operators."""
    one, model, x, _ = losses()
    mesh = comparing.mesh_of(2)
    saved = partial(create_selective_checkpoint_contexts, fla_ops.sac_ops())
    for i, mixer in enumerate(model.mixers):
        model.mixers[i] = fully_shard(checkpoint_wrapper(mixer, context_fn=saved), mesh=mesh)
    fully_shard(model, mesh=mesh)(x.chunk(2)[dist.get_rank()]).square().mean().backward()
    check(model, one)


def test_selective_checkpointing(pair: Pool) -> None:
    pair.run(recomputed)


def torchrun(*arguments: str, ranks: int = 2) -> list[str]:
    """The command that trains the example."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launch, "examples/train_distributed.py", *arguments]


ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def train(*arguments: str, ranks: int = 2) -> str:
    """What the example prints; its losses agree with one process's."""
    command = torchrun(*arguments, ranks=ranks)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the losses agree" in done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2,1,1", "1,2,1", "1,1,2", "1,2,2"])
def test_the_example_agrees_with_one_process(mesh: str) -> None:
    train("--steps", "2", "--mesh", mesh, ranks=4 if mesh == "1,2,2" else 2)


@pytest.mark.slow
def test_the_example_agrees_when_compiled() -> None:
    train("--steps", "2", "--compile")


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_another_mesh_goes_on(tmp_path: Path) -> None:
    where = ("--checkpoints", str(tmp_path), "--every", "1")
    command = torchrun("--steps", "100000", *where)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes)
    while not (tmp_path / "step-2").exists() and not list(tmp_path.glob("step-[3-9]*")):
        assert running.poll() is None
        time.sleep(0.1)
    rank = int(Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()[-1])
    os.kill(rank, signal.SIGKILL)
    said, _ = running.communicate(timeout=60)
    assert running.returncode != 0
    assert "SIGKILL" in said

    reached = max(int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*"))
    assert f"continuing after step {reached}" in train("--steps", str(reached + 2), "--mesh", "1,1,2", *where)
