"""Train the language model of this folder on several processes, and the same model on one, and compare their losses.

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py             # each rank has half of the steps
    torchrun --standalone --nproc-per-node 4 examples/train_distributed.py --cp 2      # and half of the batch

Every sequence is cut into `--cp` pieces in order; the other ranks share the batch. FSDP2 shards the parameters over all
ranks and averages their gradients, which is what the mean loss over batch and time wants. Sequences in pieces change a
model in two places: the operator exchanges its state, and the short convolution sees the end of the piece before.
"""

from __future__ import annotations

import argparse
import copy

import cores  # noqa: F401 - before PyTorch
import torch
import torch.distributed as dist
from language_model import LanguageModel, ModelConfig, ShortConvolution, cross_entropy
from text import python_library
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import fla_ops
from fla_ops.distributed import along

TOLERANCE = 1e-3  # of the loss after all steps: rounding in float32, taken in different orders


class ContinuedConvolution(nn.Module):
    """A short convolution over a piece of time, whose first steps see the last inputs of the piece before."""

    def __init__(self, convolution: ShortConvolution, line: DeviceMesh) -> None:
        super().__init__()
        self.convolution, self.line = convolution, line

    def forward(self, x: Tensor, memory: None = None) -> Tensor:  # noqa: ARG002 - a piece has no memory of its own
        """[B, T / ranks, C] to the same."""
        steps = len(self.convolution.weight) - 1
        ends = DTensor.from_local(x[None, :, x.shape[1] - steps :], self.line, [Shard(0)])
        ends = ends.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])  # of every piece
        rank = self.line.get_local_rank()
        before = ends[rank - 1] if rank > 0 else 0 * ends[0]  # the first rank too takes part in the gradient's exchange
        return self.convolution.over(torch.cat([before, x], 1))


def in_pieces(model: LanguageModel, mesh: DeviceMesh) -> LanguageModel:
    """The model for pieces of sequences along the mesh's "cp", its parameters sharded over all ranks."""
    ranks = mesh["dp", "cp"]._flatten("ranks")
    for layer in model.layers:
        layer.mixer.operator = along(mesh, "cp")(fla_ops.simple_gla)
        layer.mixer.convolve = ContinuedConvolution(layer.mixer.convolve, mesh["cp"])
        fully_shard(layer, mesh=ranks)
    return fully_shard(model, mesh=ranks)


def piece(tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    """What one rank has of tokens [B, T + 1]: its sequences, its steps in order, and one more to predict."""
    time = (tokens.shape[1] - 1) // mesh.size(1)
    first = time * mesh.get_local_rank("cp")
    return tokens.chunk(mesh.size(0))[mesh.get_local_rank("dp")][:, first : first + time + 1]


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cp", type=int, metavar="RANKS", help="pieces of a sequence (default: all ranks)")
    parser.add_argument("--steps", type=int, default=5, help="updates (default: 5)")
    parser.add_argument("--batch", type=int, default=4, help="sequences in an update (default: 4)")
    parser.add_argument("--time", type=int, default=256, help="bytes of a sequence (default: 256)")
    return parser.parse_args()


def main() -> int:
    """Train both; 0 if their losses agree."""
    o, device = options(), "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    pieces = o.cp or ranks
    if ranks % pieces or o.time % pieces or o.batch % (ranks // pieces):
        print(f"{ranks} ranks, {o.batch} sequences and {o.time} bytes do not divide by --cp {pieces}")
        return 2
    mesh = init_device_mesh(device, (ranks // pieces, pieces), mesh_dim_names=("dp", "cp"))

    torch.manual_seed(0)  # the same on every rank: the ranks of one sequence must cut the same one
    one = LanguageModel(ModelConfig(width=64, layers=2, heads=4, key_width=16, value_width=16, hidden=128)).to(device)
    model = in_pieces(copy.deepcopy(one), mesh)
    text = python_library().train.to(device)
    optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, one)]
    losses = []
    for step in range(1, o.steps + 1):
        starts = torch.randint(len(text) - o.time - 1, (o.batch, 1))
        tokens = text[(starts + torch.arange(o.time + 1)).to(device)].long()
        losses = []
        for m, optimiser in zip((model, one), optimisers, strict=True):
            loss = cross_entropy(m, piece(tokens, mesh) if m is model else tokens)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.detach())
        dist.all_reduce(losses[0])
        losses[0] /= ranks
        if rank == 0:
            print(f"step {step}: loss {float(losses[0]):.6f} on {ranks} ranks, {float(losses[1]):.6f} on one")
    difference = abs(float(losses[0] - losses[1]))
    dist.destroy_process_group()
    if rank == 0:
        print(f"the losses {'agree' if difference < TOLERANCE else 'differ'}: {difference:.1e}")
    return int(difference >= TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
