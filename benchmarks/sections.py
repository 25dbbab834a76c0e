"""Measurements beside the comparisons: the price of a call, of a first call, and how cost grows with T."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import torch

from fla_ops.registrations import _op as registry

from .ceilings import Ceilings
from .contenders import EAGER, ours
from .groups import Row, Settings, group
from .machine import ROOT
from .problems import FORWARD, TRAINING, Problem, problems
from .sizes import SWEEP
from .timing import Contender, measure

TINY = {"B": 1, "T": 16, "H": 1, "HQ": 1, "HK": 1, "N": 1, "K": 16, "V": 16, "M": 16}
SWEPT = ("chunk", "fused_chunk")
QUADRATIC_UP_TO = {"cpu": 16384, "cuda": 65536}
PEERS_UP_TO = {"cpu": 4096, "cuda": 65536}
TRAINED_UP_TO = {"cpu": 16384, "cuda": 131072}


def overhead(problem: Problem, settings: Settings) -> Row:
    """One eager call at sizes where the arithmetic takes no time, beside its kernel alone: the launcher called
    directly on a CPU, the replay of a captured graph on a GPU.
    """
    tiny = problem.resized(**{letter: size for letter, size in TINY.items() if letter in problem.sizes})
    device = settings.device
    training = TRAINING in problem.passes
    sets = [tiny.inputs(device)]
    calls = [ours(tiny, tiny.passes[0], EAGER, sets, "call")]
    operator = registry.OPERATORS[problem.operator]
    if device.type == "cuda":
        calls.append(_captured(calls[0]))
    elif operator.cpu is not None:
        launcher, overload = registry.resolve(operator.cpu), operator.overload
        arguments = [sets[0].get(a.name, a.default_value) for a in overload._schema.arguments]

        def kernel(_: int) -> object:
            with torch._C._AutoDispatchBelowAutograd():  # as the registered kernel is called
                return launcher(*arguments)

        calls.append(Contender("kernel", kernel))
    if training:
        trained = [{name: x.detach().requires_grad_() if name in tiny.trained else x for name, x in sets[0].items()}]
        calls.append(ours(tiny, TRAINING, EAGER, trained, "training call"))
    measure(calls, device, settings.seconds / 2)
    best = {c.name: min(c.samples) * 1e6 for c in calls}
    row = {"operator": problem.operator, "call_us": best["call"], "training_call_us": best.get("training call")}
    kernel = best.get("kernel")
    return {**row, "kernel_us": kernel, "beyond_us": None if kernel is None else best["call"] - kernel}


def _captured(call: Contender) -> Contender:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call.call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.call(0)
    return Contender("kernel", lambda _: graph.replay())


def first_calls(device: torch.device, operators: list[str]) -> list[Row]:
    """Seconds from a new process to the first result, with no kernel compiled before."""
    rows = []
    for operator in operators:
        with tempfile.TemporaryDirectory() as empty:
            environment = {
                **os.environ,
                "TRITON_CACHE_DIR": empty,
                "FLA_OPS_CACHE_DIR": empty,
                "PYTHONPATH": _python_path(),
            }
            command = [sys.executable, "-m", "benchmarks.first_call", operator, device.type]
            start = time.perf_counter()
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                times = json.loads(done.stdout.splitlines()[-1])
                rows.append({"operator": operator, "process_s": time.perf_counter() - start, **times})
    return rows


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def sweep(device: torch.device, quick: bool) -> list[tuple[list[Problem], str]]:
    """What the plots show: for each family its chunkwise forms side by side, over lengths."""
    families: dict[str, list[Problem]] = {}
    for problem in problems(device):
        forms = families.setdefault(problem.family, [])
        named = problem.role in SWEPT or problem.operator == "parallel_attn"
        if named and not problem.strong and all(p.operator != problem.operator for p in forms):
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


def sweep_rows(forms: list[Problem], what: str, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """One length of one family: every form eager, with the peers up to a length that the slowest can bear."""
    first, *others = forms
    peers = settings.peers and first.sizes["T"] <= PEERS_UP_TO[settings.device.type]
    plain = replace(settings, seconds=settings.seconds / 2, ways=(EAGER,), peers=peers, half=False)
    rows = group(first, what, plain, ceilings, others)
    for row in rows:
        if "median_ms" in row:
            row["us_per_token"] = row["median_ms"] * 1e3 / (first.sizes["B"] * first.sizes["T"])
    return rows
