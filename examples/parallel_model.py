"""The language model on a mesh: sequences in pieces along "cp", heads along "tp", parameters sharded by FSDP2.

Everything is written in plain tensors: what a rank computes with is its own piece of each.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from language_model import GatedMLP, LanguageModel, Mixer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fla_ops
from fla_ops.distributed import along


class SplitLinear(nn.Module):
    """A linear layer whose outputs are several things, as a layer for each: ranks then share each of them."""

    def __init__(self, joint: nn.Linear, widths: list[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(joint.in_features, width, bias=False) for width in widths)
        with torch.no_grad():
            for part, weight in zip(self.parts, joint.weight.split(widths), strict=True):
                part.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to what this rank has of each part, side by side."""
        return torch.cat([part(x) for part in self.parts], -1)


class SplitConvolution(nn.Module):
    """The short convolution likewise; over a piece of time, whose first steps see the last ones of the piece before."""

    def __init__(self, weight: Tensor, widths: list[int]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(part.detach().clone() for part in weight.split(widths, 1))
        self.line: DeviceMesh | None = None
        self.register_buffer("follows", torch.tensor(False), persistent=False)  # whether there is a piece before

    def continue_along(self, line: DeviceMesh) -> None:
        """The ranks of this mesh have the pieces of a sequence, in order."""
        self.line = line
        self.follows.fill_(line.get_local_rank() > 0)

    def forward(self, x: Tensor, memory: None = None) -> Tensor:  # noqa: ARG002 - a piece has no memory of its own
        """[B, T / ranks, C] to the same."""
        weight = torch.cat([own(part, Shard(1)) for part in self.weights], -1)
        before, time = len(weight) - 1, x.shape[1]
        x = torch.cat([self._ends_before(x, before), x], 1)
        return sum((x[:, i : i + time] * weight[i] for i in range(1, len(weight))), x[:, :time] * weight[0])

    def _ends_before(self, x: Tensor, steps: int) -> Tensor:
        """The first rank too takes part in the exchange and in its gradient's: which it is, no compiler may know."""
        if self.line is None:
            return x.new_zeros(x.shape[0], steps, x.shape[2])
        ends = DTensor.from_local(x[None, :, x.shape[1] - steps :], self.line, [Shard(0)])
        ends = ends.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])  # of every piece
        return torch.where(self.follows, ends[self.line.get_local_rank() - 1], 0)


class HeadNorm(nn.RMSNorm):
    """A norm of each head with one weight for all of them."""

    def forward(self, x: Tensor) -> Tensor:
        """The gradient of the weight is a sum over all ranks' heads."""
        return F.rms_norm(x, self.normalized_shape, own(self.weight, Partial()), self.eps)


def own(parameter: Tensor, gradient: Shard | Partial) -> Tensor:
    """What this rank has of a parameter; `gradient` is how the ranks' gradients of it make up the whole."""
    return parameter.to_local(grad_placements=[gradient]) if isinstance(parameter, DTensor) else parameter


def split(model: LanguageModel) -> LanguageModel:
    """The same model with a parameter for each thing that ranks share; in place."""
    for layer in model.layers:
        mixer, mlp = layer.mixer, layer.mlp
        mixer.project = SplitLinear(mixer.project, mixer.widths)
        mixer.convolve = SplitConvolution(mixer.convolve.weight, mixer.widths)
        mixer.norm = HeadNorm(mixer.norm.normalized_shape, mixer.norm.eps)
        mlp.up = SplitLinear(mlp.up, [mlp.down.in_features] * 2)
    return model


def on_mesh(model: LanguageModel, mesh: DeviceMesh, compiled: bool = False) -> LanguageModel:
    """The split model on a mesh with the dimensions "dp", "cp" and "tp"."""
    data = mesh["dp", "cp"]._flatten("data")
    for layer in model.layers:
        if mesh["cp"].size() > 1:
            layer.mixer.operator = along(mesh, "cp")(fla_ops.simple_gla)
            layer.mixer.convolve.continue_along(mesh["cp"])
        if mesh["tp"].size() > 1:
            share_heads(layer.mixer, layer.mlp, mesh["tp"])
        if compiled:
            layer.compile(fullgraph=True)
        fully_shard(layer, mesh=data)
    return fully_shard(model, mesh=data)


def share_heads(mixer: Mixer, mlp: GatedMLP, ranks: DeviceMesh) -> None:
    """Give each rank some of the heads, and some of the hidden channels."""
    columns = ("decay", "gate", *(f"project.parts.{i}" for i in range(3)))
    parallelize_module(mixer, ranks, {name: ColwiseParallel() for name in columns} | {"out": RowwiseParallel()})
    plan = {f"up.parts.{i}": ColwiseParallel() for i in range(2)} | {"down": RowwiseParallel()}
    parallelize_module(mlp, ranks, plan)
    weights = mixer.convolve.weights
    for i, weight in enumerate(weights):
        weights[i] = nn.Parameter(distribute_tensor(weight, ranks, [Shard(1)]))
    mixer.norm.weight = nn.Parameter(distribute_tensor(mixer.norm.weight, ranks, [Replicate()]))
    mixer.heads //= ranks.size()
    mixer.widths = [width // ranks.size() for width in mixer.widths]


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of the gradient of all parameters, over all ranks; what several ranks have counts once."""
    ranks, square = dist.get_world_size(), torch.zeros((), device=next(model.parameters()).device)
    for gradient in (parameter.grad for parameter in model.parameters()):
        local, shards = gradient, 1
        if isinstance(gradient, DTensor):
            local, mesh = gradient.to_local(), gradient.device_mesh
            shards = math.prod(
                mesh.size(i) for i, placed in enumerate(gradient.placements) if not placed.is_replicate()
            )
        square += local.square().sum() * (shards / ranks)
    dist.all_reduce(square)
    return square.sqrt()
