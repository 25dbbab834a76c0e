"""What a table of times does not show: what is kept for a gradient, and the work that decay saves softmax attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import fla_ops
from fla_ops.registrations import _op as registry

from .contenders import EAGER, input_sets, ours
from .groups import Settings
from .problems import FORWARD, TRAINING, Inputs, Problem
from .sizes import sizes_for
from .timing import Contender, measure

Row = dict[str, Any]
DECAYS = {"none": None, "a gate that forgets slowly": 4.0, "a plain log-sigmoid gate": 0.0}  # added before the sigmoid


def checkpoint_levels(settings: Settings) -> list[Row]:
    """chunk_gsa at each level: bytes kept for the gradient beside the inputs, and the time of forward and backward."""
    problem = Problem("chunk_gsa", "gsa", "chunk", sizes_for(settings.device.type, "gsa", "chunk")[0])
    inputs = input_sets(problem, TRAINING, settings.device, 0)[0]
    rows, calls = [], []
    for level in (0, 1, 2):
        at_level = inputs | {"checkpoint_level": level}
        rows.append({"level": str(level), "sizes": dict(problem.sizes), "kept_mib": _kept(at_level) / 2**20})
        calls.append(ours(problem, TRAINING, EAGER, [at_level], str(level)))
    measure(calls, settings.device, settings.seconds)
    return [row | {"median_ms": call.median * 1e3} for row, call in zip(rows, calls, strict=True)]


def _kept(inputs: Inputs) -> int:
    """Bytes of the tensors that autograd keeps, without the inputs themselves."""
    given = {x.untyped_storage().data_ptr() for x in inputs.values() if isinstance(x, Tensor)}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        fla_ops.chunk_gsa(**inputs)
    return sum(kept.values())


def pruning(settings: Settings) -> list[Row]:
    """parallel_attn on a CPU under decays: the share of its products that is computed, and the time."""
    problem = Problem("parallel_attn", "attn", "parallel", sizes_for("cpu", "attn", "parallel")[0])
    rows, calls = [], []
    launcher = registry.resolve(registry.OPERATORS["parallel_attn_forward"].cpu or "")
    for name, shift in DECAYS.items():
        inputs = problem.inputs(settings.device)
        noise = torch.randn(inputs["g"].shape, generator=torch.Generator().manual_seed(1))
        inputs["g"] = None if shift is None else torch.nn.functional.logsigmoid(noise + shift)
        arguments = inputs | dict.fromkeys(("scale", "window_size", "cu_seqlens", "chunk_indices", "sink_bias"))
        with FlopCounterMode(display=False) as counter:
            launcher(**arguments, output_rest=False)
        rows.append({"decay": name, "sizes": dict(problem.sizes), "flops": counter.get_total_flops()})
        calls.append(ours(problem, FORWARD, EAGER, [inputs], name))
    measure(calls, settings.device, settings.seconds)
    return [_pruned(row, rows[0], call) for row, call in zip(rows, calls, strict=True)]


def _pruned(row: Row, whole: Row, call: Contender) -> Row:
    return row | {"share": row["flops"] / whole["flops"], "median_ms": call.median * 1e3}
