"""The sections of a run beside the comparisons: the cost of a call, costs over lengths, and details of two operators.

The details are what `chunk_gsa` keeps for its gradient, and the work that decay saves `parallel_attn`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import fla_ops
from fla_ops.registrations._op import resolve

from .comparison import EAGER, Row, Settings, compare, input_sets, ours
from .machine import ROOT
from .problems import FORWARD, SWEEP, TRAINING, Inputs, Problem, problems, schema_arguments, sizes_for
from .roofline import Roofline
from .timing import Implementation, measure, synchronise

TINY = {"B": 1, "T": 16, "H": 1, "HQ": 1, "HK": 1, "N": 1, "K": 16, "V": 16, "M": 16}
SWEPT = ("chunk", "fused_chunk")
QUADRATIC_UP_TO = {"cpu": 16384, "cuda": 65536}
PEERS_UP_TO = {"cpu": 4096, "cuda": 65536}
TRAINED_UP_TO = {"cpu": 16384, "cuda": 131072}
DECAYS = {"none": None, "a gate that forgets slowly": 4.0, "a plain log-sigmoid gate": 0.0}  # added before the sigmoid
FIRST_CALLS = """
import sys, time
start = time.perf_counter()
import torch
torch_imported = time.perf_counter()
import fla_ops
imported = time.perf_counter()
from benchmarks.sections import print_first_calls
print_first_calls(*sys.argv[1:], import_torch_s=torch_imported - start, import_s=imported - torch_imported)
"""


def cpu_kernel(operator: str, inputs: Inputs) -> Callable[[], Any] | None:
    """Make a call of an operator's CPU implementation without the dispatcher; None for a composite, which has none."""
    path = fla_ops.ops()[operator].cpu
    if path is None:
        return None
    kernel = resolve(path)
    arguments = [inputs.get(a.name, a.default_value) for a in schema_arguments(operator)]

    def call() -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # as the registered kernel is called
            return kernel(*arguments)

    return call


def overhead(problem: Problem, settings: Settings) -> Row:
    """Time one eager call at sizes where the arithmetic takes no time, and its kernel alone.

    The kernel alone is the CPU implementation called directly, or the replay of a captured graph on a GPU.
    """
    tiny = problem.resized(**{letter: size for letter, size in TINY.items() if letter in problem.sizes})
    device = settings.device
    inputs = tiny.inputs(device)
    calls = [ours(tiny, tiny.passes[0], EAGER, [inputs], "call")]
    if device.type == "cuda":
        calls.append(_captured(calls[0]))
    elif (kernel := cpu_kernel(problem.operator, inputs)) is not None:
        calls.append(Implementation("kernel", lambda _: kernel()))
    if TRAINING in problem.passes:
        trained = {name: x.detach().requires_grad_() if name in tiny.trained else x for name, x in inputs.items()}
        calls.append(ours(tiny, TRAINING, EAGER, [trained], "training call"))
    measure(calls, device, settings.seconds / 2)
    best = {x.name: min(x.samples) * 1e6 for x in calls}
    alone = best.get("kernel")
    return {
        "operator": problem.operator,
        "call_us": best["call"],
        "training_call_us": best.get("training call"),
        "kernel_us": alone,
        "beyond_us": None if alone is None else best["call"] - alone,
    }


def _captured(eager: Implementation) -> Implementation:
    """Capture a call in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        eager.call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        eager.call(0)
    return Implementation("kernel", lambda _: graph.replay())


def first_calls(device: torch.device, operators: list[str]) -> list[Row]:
    """Time imports and first calls, each operator in a process of its own with nothing compiled before."""
    rows = []
    for operator in operators:
        with tempfile.TemporaryDirectory() as empty:
            environment = {**os.environ, "TRITON_CACHE_DIR": empty, "FLA_OPS_CACHE_DIR": empty}
            command = [sys.executable, "-c", FIRST_CALLS, operator, device.type]
            start = time.perf_counter()
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                times = json.loads(done.stdout.splitlines()[-1])
                rows.append({"operator": operator, "process_s": time.perf_counter() - start, **times})
    return rows


def print_first_calls(operator: str, device_type: str, **times: float) -> None:
    """Print as JSON the seconds of the first and the second call of each pass, after those given."""
    device = torch.device(device_type)
    problem = next(p for p in problems(device, quick=True) if p.operator == operator)
    for pass_ in problem.passes:
        call = ours(problem, pass_, EAGER, input_sets(problem, pass_, device, rotate=False)).call
        for which in ("first", "second"):
            synchronise(device)
            begin = time.perf_counter()
            call(0)
            synchronise(device)
            times[f"{which}_{pass_}_s"] = time.perf_counter() - begin
    print(json.dumps(times))


def sweep(device: torch.device, quick: bool) -> list[tuple[list[Problem], str]]:
    """List what the plots show: for each family its chunkwise forms side by side, over lengths."""
    families: dict[str, list[Problem]] = {}
    for problem in problems(device):
        forms = families.setdefault(problem.family, [])
        shown = problem.form in SWEPT or problem.operator == "parallel_attn"
        if shown and not problem.strong and all(p.operator != problem.operator for p in forms):
            forms.append(problem.resized(B=1))
    lengths = SWEEP[device.type][:2] if quick else SWEEP[device.type]
    found = []
    for family, forms in families.items():
        for length in lengths if forms else ():
            if family == "attn" and length > QUADRATIC_UP_TO[device.type]:
                continue
            at_length = [p.resized(T=length) for p in forms]
            found.append((at_length, FORWARD))
            if length <= TRAINED_UP_TO[device.type]:
                found.append((at_length, TRAINING))
    return found


def sweep_rows(forms: list[Problem], pass_: str, settings: Settings, roofline: Roofline) -> list[Row]:
    """Time one length of one family: every form eagerly, and the peers up to a length that the slowest can bear."""
    first, *others = forms
    peers = settings.peers and first.sizes["T"] <= PEERS_UP_TO[settings.device.type]
    plain = replace(settings, seconds=settings.seconds / 2, ways=(EAGER,), peers=peers, half=False)
    rows = compare(first, pass_, plain, roofline, others)
    for row in rows:
        if "median_ms" in row:
            row["us_per_token"] = row["median_ms"] * 1e3 / (first.sizes["B"] * first.sizes["T"])
    return rows


def checkpoint_levels(settings: Settings) -> list[Row]:
    """Measure chunk_gsa at each level: the bytes kept for the gradient, and the time of forward and backward."""
    problem = Problem("chunk_gsa", "gsa", "chunk", sizes_for(settings.device.type, "gsa", "chunk")[0])
    inputs = input_sets(problem, TRAINING, settings.device, rotate=False)[0]
    rows, calls = [], []
    for level in (0, 1, 2):
        at_level = inputs | {"checkpoint_level": level}
        rows.append({"level": str(level), "sizes": dict(problem.sizes), "kept_mib": _kept(at_level) / 2**20})
        calls.append(ours(problem, TRAINING, EAGER, [at_level], str(level)))
    measure(calls, settings.device, settings.seconds)
    return [row | {"median_ms": x.median * 1e3} for row, x in zip(rows, calls, strict=True)]


def _kept(inputs: Inputs) -> int:
    """Count the bytes of the tensors that autograd keeps beside the inputs."""
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
    """Measure parallel_attn on a CPU under decays: the share of its products that it computes, and the time."""
    problem = Problem("parallel_attn", "attn", "parallel", sizes_for("cpu", "attn", "parallel")[0])
    rows, calls = [], []
    for name, shift in DECAYS.items():
        inputs = problem.inputs(settings.device)
        noise = torch.randn(inputs["g"].shape, generator=torch.Generator().manual_seed(1))
        inputs["g"] = None if shift is None else torch.nn.functional.logsigmoid(noise + shift)
        kernel = cpu_kernel("parallel_attn_forward", inputs)
        with FlopCounterMode(display=False) as counter:
            kernel()
        rows.append({"decay": name, "sizes": dict(problem.sizes), "flops": counter.get_total_flops()})
        calls.append(ours(problem, FORWARD, EAGER, [inputs], name))
    measure(calls, settings.device, settings.seconds)
    whole = rows[0]["flops"]
    return [
        row | {"share": row["flops"] / whole, "median_ms": x.median * 1e3} for row, x in zip(rows, calls, strict=True)
    ]
