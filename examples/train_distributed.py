"""Train the language model of this folder on a mesh of processes, and the same model on one, and compare their losses.

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py                  # each has half of the steps
    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --mesh 1,1,2     # half of the heads
    torchrun --standalone --nproc-per-node 4 examples/train_distributed.py --mesh 1,2,2 --checkpoints FOLDER

`--mesh DP,CP,TP` says how many ranks share the batch, the steps of a sequence and the heads. FSDP2 shards the
parameters over DP and CP. With `--checkpoints` a run goes on where it stopped, on any mesh.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import sys
from pathlib import Path

import cores  # noqa: F401 - before PyTorch
import torch
import torch.distributed as dist
from language_model import LanguageModel, ModelConfig, cross_entropy
from parallel_model import gradient_norm, on_mesh, split
from sharded_checkpoint import load, save
from text import python_library, random_windows
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

TOLERANCE = 1e-3  # of the loss after all steps: rounding in float32, taken in different orders
PATIENCE = dt.timedelta(minutes=5)  # with a rank that does not answer
AXES = ("dp", "cp", "tp")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mesh", metavar="DP,CP,TP", help="ranks for the batch, for time, for heads (default: all for time)")
    add("--steps", type=int, default=5, help="updates in all (default: 5)")
    add("--batch", type=int, default=4, help="sequences in an update (default: 4)")
    add("--time", type=int, default=256, help="bytes of a sequence (default: 256)")
    add("--compile", action="store_true", help="compile each layer, with fullgraph=True")
    add("--checkpoints", type=Path, metavar="FOLDER", help="continue from the newest one in it, and leave others there")
    add("--every", type=int, default=2, metavar="STEPS", help="from one checkpoint to the next (default: 2)")
    add("--alone", action="store_true", help="train no model on one process beside it")
    return parser.parse_args()


def mesh_of(o: argparse.Namespace, device: str) -> DeviceMesh:
    """The mesh that was asked for, if it divides everything."""
    ranks = dist.get_world_size()
    sizes = [1, ranks, 1] if o.mesh is None else [int(n) for n in o.mesh.split(",")]
    if len(sizes) != len(AXES) or sizes[0] * sizes[1] * sizes[2] != ranks:
        raise SystemExit(f"--mesh {o.mesh} is not DP,CP,TP whose product is the number of ranks, {ranks}")
    data, pieces, heads = sizes
    if o.batch % data or o.time % pieces or config().heads % heads:
        raise SystemExit(f"{o.batch} sequences, {o.time} bytes and {config().heads} heads do not divide by {sizes}")
    return init_device_mesh(device, tuple(sizes), mesh_dim_names=AXES)


def config() -> ModelConfig:
    """A model that trains for a few steps in seconds."""
    return ModelConfig(width=64, layers=2, heads=4, key_width=16, value_width=16, hidden=128)


def piece(tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    """What one rank has of tokens [B, T + 1]: its sequences, its steps in order, and one more to predict."""
    time = (tokens.shape[1] - 1) // mesh["cp"].size()
    first = time * mesh.get_local_rank("cp")
    return tokens.chunk(mesh["dp"].size())[mesh.get_local_rank("dp")][:, first : first + time + 1]


def update(model: LanguageModel, optimiser: torch.optim.Optimizer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One update: the loss before it, and the norm of the gradient over all parameters."""
    loss = cross_entropy(model, tokens)
    loss.backward()
    norm = gradient_norm(model)
    optimiser.step()
    optimiser.zero_grad()
    return loss.detach(), norm


def main() -> int:
    """Train both; 0 if their losses agree."""
    o, device = options(), "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    mesh, first_rank = mesh_of(o, device), dist.get_rank() == 0

    torch.manual_seed(0)  # the same weights on every rank
    one = split(LanguageModel(config())).to(device)
    model = on_mesh(copy.deepcopy(one), mesh, o.compile)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, one))
    text = python_library().train.to(device)
    begun = load(o.checkpoints, model, ours) if o.checkpoints else 0
    if begun and first_rank:
        print(f"continuing after step {begun}")

    loss, alone, norm_alone = torch.zeros((), device=device), None, None
    with tqdm(total=o.steps, unit="step", disable=not (first_rank and sys.stderr.isatty())) as bar:
        for step in range(1, o.steps + 1):
            tokens = random_windows(text, o.batch, o.time, seed=step)
            if not o.alone:
                alone, norm_alone = update(one, theirs, tokens)
            bar.update()
            if step <= begun:
                continue
            loss, norm = update(model, ours, piece(tokens, mesh))
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
            if first_rank:
                beside = "" if alone is None else f"; on one {float(alone):.6f} and {float(norm_alone):.4f}"
                bar.write(f"step {step}: loss {float(loss):.6f}, gradient {norm:.4f} on {mesh.size()} ranks{beside}")
            if o.checkpoints and (step % o.every == 0 or step == o.steps):
                save(o.checkpoints, step, model, ours)
    dist.destroy_process_group()
    if alone is None or begun >= o.steps:
        return 0
    difference = abs(float(loss - alone))
    if first_rank:
        print(f"the losses {'agree' if difference < TOLERANCE else 'differ'}: {difference:.1e}")
    return int(difference >= TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
