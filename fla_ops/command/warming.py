"""`python -m fla_ops warm`: compile kernels now, so that no first call has to.

The C++ kernels are compiled for this machine. Triton kernels are compiled for a target that need not be here: the
operators run on host tensors, their launchers ask Triton for each kernel as they would on that card, and Triton keeps
what it makes in its own cache, where a launch finds it.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fla_ops
from fla_ops import launch
from fla_ops.common.cpu import build

from . import Report
from .checking import cache_folder
from .problems import Problem, Sizes, problems

TARGETS = {  # backend, architecture and threads of a warp, as Triton has them
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Compiled:
    """What was compiled for one operator."""

    target: str
    operator: str
    key_width: int
    value_width: int
    dtype: str
    kernels: dict[str, float]  # seconds; next to none for what was kept
    failure: str | None = None

    def __str__(self) -> str:
        said = self.failure or f"{len(self.kernels)} kernels, {sum(self.kernels.values()):.1f} s"
        return f"{self.target:8s} {self.operator:32s} {self.key_width}x{self.value_width} {self.dtype:9s} {said}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `warm`."""
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=[], help="compile Triton kernels for these")
    parser.add_argument("--widths", nargs="+", type=_widths, metavar="K[xV]", default=[(64, 64)],
                        help="widths of heads: 128, or 128x64 for keys and values; 64 unless given")  # fmt: skip
    parser.add_argument("--heads", type=int, default=16, help="value heads (attn: query heads), 16 unless given")
    parser.add_argument("--key-heads", type=int, help="heads of q and k (attn: of k and v); as many unless given")
    parser.add_argument("--slots", type=int, default=64, help="memory slots of gsa, 64 unless given")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="bfloat16 unless given")
    parser.add_argument("--operators", metavar="REGEX", default="", help="only operators whose names match")


def report(options: argparse.Namespace) -> Report:
    """A line for each source file and each operator; status 1 if one does not compile, or if nothing can be kept."""
    if options.target and os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set: there is nothing to compile for --target")
    compiled = build.warm()
    writable, folder = cache_folder()
    lines = [f"{source:40s} {'ready' if ready else 'does not compile'}" for source, ready in compiled.items()]
    lines.append(f"{'cache':40s} {folder}")
    found = [x for target in options.target for x in _of_target(target, options)]
    data = {"cache": folder, "writable": writable, "compiled": compiled, "kernels": [asdict(x) for x in found]}
    right = writable and all(compiled.values()) and not any(x.failure for x in found)
    return Report(data, "\n".join([*lines, *map(str, found)]), 0 if right else 1)


def _widths(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found or "0" in found.groups():
        raise argparse.ArgumentTypeError(f"wanted a width such as 128, or 128x64, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def _of_target(target: str, options: argparse.Namespace) -> Iterator[Compiled]:
    heads = {"H": options.heads, "HK": options.key_heads or options.heads, "M": options.slots}
    with _active(target):
        for (key, value), dtype in product(options.widths, options.dtype):
            for problem in problems(Sizes(K=key, V=value, D=options.heads * value, **heads)):
                if re.search(options.operators, problem.function):
                    kernels, failure = _compile(target, problem, DTYPES[dtype])
                    if kernels or failure:
                        yield Compiled(target, problem.function, key, value, dtype, kernels, failure)


@contextmanager
def _active(target: str) -> Iterator[None]:
    """Triton believes that the target is its current device."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_device(self) -> str:
            return target

        def get_current_stream(self, device: str) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget(*TARGETS[target])

    before = driver._active  # None where nothing has asked for a GPU yet: `active` would look for one
    driver.set_active(Driver())
    try:
        yield
    finally:
        driver.set_active(before)


def _compile(target: str, problem: Problem, dtype: torch.dtype) -> tuple[dict[str, float], str | None]:
    """The seconds of each kernel of an operator and its gradient, and what was raised."""
    seconds: dict[str, float] = {}

    def prepare(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        begin = time.perf_counter()
        kernel.warmup(*args, grid=(programs,), **constants)
        seconds[kernel.__name__] = seconds.get(kernel.__name__, 0) + time.perf_counter() - begin

    try:
        with launch.elsewhere(target, prepare):
            for without in _variants(problem):
                _run(problem, dtype, without)
    except Exception as raised:  # noqa: BLE001  (the other operators' kernels are still wanted)
        return seconds, f"{type(raised).__name__}: {raised}"
    return seconds, None


def _variants(problem: Problem) -> list[tuple[str, ...]]:
    """What to leave out: nothing, the first state (a prompt), both states (training)."""
    if "initial_state" not in problem.inputs:
        return [()]
    return [(), ("initial_state",), ("initial_state", *problem.flags)]


def _run(problem: Problem, dtype: torch.dtype, without: Sequence[str]) -> None:
    """The call and its gradient. Gates and states are in float32, as models have them; no kernel computes anything."""

    def given(path: Any, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        name = path[0].key
        kept = name in ("g", "g_gamma", "dt", "A", "dt_bias", "beta") or "state" in name or name == "z"
        wanted = x.dtype if not x.is_floating_point() else torch.float32 if kept else dtype
        x = x.to(wanted, copy=True)
        return x.requires_grad_(problem.trained and x.is_floating_point())

    inputs = {name: x for name, x in problem.inputs.items() if name not in without}
    inputs = pytree.tree_map_with_path(given, inputs)
    flags = {name: x for name, x in problem.flags.items() if name not in without}
    results = [x for x in pytree.tree_leaves(getattr(fla_ops, problem.function)(**inputs, **flags)) if x is not None]
    if problem.trained:
        trained = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.grad(results, trained, [torch.zeros_like(x) for x in results], allow_unused=True)
