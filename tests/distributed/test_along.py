"""Models in plain tensors: `fla_ops.distributed.along` on pieces is the function on whole sequences, compiled too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fla_ops
from fla_ops.distributed import along
from tests import numerics
from tests.distributed import comparing
from tests.distributed.pool import Pool

HEADS, KEY, VALUE, SLOTS = 4, 5, 3, 6


def draw(time: int, *widths: int) -> Tensor:
    """The same on every rank."""
    return torch.randn(1, time, HEADS, *widths, dtype=torch.float64)


def check(function: Callable[..., Any], on_pieces: Callable[..., Any], whole: dict[str, Any], timed: set[str]) -> None:
    """Outputs and gradients of pieces against those of whole sequences. `timed` arguments are cut in time."""
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def piece(x: Tensor) -> Tensor:
        return x.chunk(ranks, 1)[rank]

    names = [name for name, x in whole.items() if isinstance(x, Tensor) and x.is_floating_point()]
    alone = whole | {name: whole[name].clone().requires_grad_() for name in names}
    mine = whole | {
        name: (piece(whole[name]) if name in timed else whole[name]).clone().requires_grad_() for name in names
    }
    expected, found = function(**alone), on_pieces(**mine)
    loss = torch.zeros((), dtype=torch.float64)
    for i, (y, x) in enumerate(zip(found, expected, strict=True)):
        numerics.close(y, x if i else piece(x))
        weights = torch.arange(x.numel(), dtype=x.dtype).view_as(x).cos()
        # Every rank has the final states, and one of them uses them.
        loss = loss + (y * (weights if i else piece(weights))).sum() * (i == 0 or rank == 0)
    sum((x * torch.arange(x.numel(), dtype=x.dtype).view_as(x).cos()).sum() for x in expected).backward()
    loss.backward()
    for name in names:
        gradient = mine[name].grad
        if name not in timed:
            dist.all_reduce(gradient)  # as a parameter's: the ranks have a share each
        numerics.close(gradient, piece(alone[name].grad) if name in timed else alone[name].grad)


def flat(function: Callable[..., Any], **settings: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The function with its outputs in one tuple, those that are None left out."""

    def run(**arguments: Any) -> tuple[Tensor, ...]:
        if "initial_k" in arguments:
            arguments["initial_state"] = arguments.pop("initial_k"), arguments.pop("initial_v")
        out = function(**arguments, **settings)
        parts = out if isinstance(out, tuple) else (out,)
        flattened = [y for x in parts for y in (x if isinstance(x, tuple) else (x,))]
        return tuple(x for x in flattened if x is not None)

    return run


def functions() -> None:
    """Each family, whole and packed."""
    torch.manual_seed(0)
    line = along(comparing.mesh_of(2))
    q, k, v, s = draw(8, KEY), draw(8, KEY), draw(8, VALUE), draw(8, SLOTS)
    g, gates, decay = -draw(8).abs(), -draw(8, SLOTS).abs(), -torch.rand(HEADS, dtype=torch.float64)
    qkv = {"q": q, "k": k, "v": v}
    calls: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (fla_ops.simple_gla, qkv | {"g": g}, {"output_final_state": True}),
        (fla_ops.chunk_simple_gla, qkv | {"g_gamma": decay}, {"reverse": True, "output_final_state": True}),
        (fla_ops.lightning_attn, qkv, {"layer_idx": 1, "num_layers": 4}),
        (fla_ops.linear_attn, {"q": q.abs(), "k": k.abs(), "v": v}, {"output_final_state": True}),
        (fla_ops.attn, qkv | {"g": g}, {"window_size": 5}),
    ]
    timed = {"q", "k", "v", "g", "s"}
    for function, arguments, settings in calls:
        for packing in ({}, {"cu_seqlens": torch.tensor([0, 2, 2, 7, 8])}):
            check(flat(function, **settings), flat(line(function), **settings), arguments | packing, timed)
    states = {
        "initial_k": torch.randn(1, HEADS, KEY, SLOTS, dtype=torch.float64),
        "initial_v": torch.randn(1, HEADS, SLOTS, VALUE, dtype=torch.float64),
    }
    arguments = qkv | {"s": s, "g": gates} | states
    check(
        flat(fla_ops.gsa, output_final_state=True), flat(line(fla_ops.gsa), output_final_state=True), arguments, timed
    )


def test_functions(pair: Pool) -> None:
    pair.run(functions)


def compiled(backend: str, lengths: tuple[int, ...]) -> int:
    """A model around the operator, compiled once for all lengths; the number of graphs."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    simple_gla = along(comparing.mesh_of(2))(fla_ops.chunk_simple_gla)
    counter = CompileCounterWithBackend(backend)

    def model(function: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        o, _ = function(q, k, v, F.logsigmoid(g))
        return (torch.tanh(o),)

    def on_pieces(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return model(simple_gla, q, k, v, g)

    def alone(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return model(fla_ops.chunk_simple_gla, q, k, v, g)

    function = torch.compile(on_pieces, fullgraph=True, dynamic=True, backend=counter)
    for time in lengths:
        whole = {"q": draw(time, KEY), "k": draw(time, KEY), "v": draw(time, VALUE), "g": draw(time)}
        check(alone, function, whole, set(whole))
    return counter.frame_count


def test_one_graph_for_all_lengths(pair: Pool) -> None:
    assert pair.run(compiled, "aot_eager", (32, 48, 80)) == 1


@pytest.mark.slow
def test_one_graph_for_all_lengths_in_inductor(pair: Pool) -> None:
    assert pair.run(compiled, "inductor", (32, 48)) == 1


def refused() -> None:
    """What is no operator's function, a dimension that the mesh lacks, heads that do not divide."""
    mesh = comparing.mesh_of(2)
    with pytest.raises(TypeError, match=r"along wants a function such as fla_ops\.simple_gla, got 'elu'"):
        along(mesh)(F.elu)
    with pytest.raises(TypeError, match=r"got 'simple_gla_step_'"):
        along(mesh)(fla_ops.simple_gla_step_)
    with pytest.raises(ValueError, match=r"dim must be one of the mesh's dimensions, \('d0',\), got 'cp'"):
        along(mesh, "cp")
    q = torch.randn(1, 4, 3, 5)
    with pytest.raises(ValueError, match=r"must be multiples of the ranks, 2, got H = 3, HQ = 3"):
        along(mesh, "d0")(fla_ops.attn)(q, q, q)


def test_what_is_refused(pair: Pool) -> None:
    pair.run(refused)
