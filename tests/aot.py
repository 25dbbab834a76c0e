"""Compile the launches of an operator for GPUs that are not here, and read what they use from the machine code.

The launchers run as they are, on host tensors; `launches` records what they would have launched and runs nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fla_ops import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# 8.0 itself has 163 KiB; its settings also serve 8.6, 8.9 and 12.x.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TENSOR_CORE = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+)")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One launch, as a launcher asked for it."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes; `spilled` in bytes (NVIDIA) or registers (AMD)."""

    registers: int
    spilled: int
    shared: int
    tensor_core: bool


@contextmanager
def launches(target: str) -> Iterator[list[Launch]]:
    """Record the launches made inside, with the settings for `target`, instead of making them."""
    recorded: list[Launch] = []

    def record(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        if programs > 0:
            recorded.append(Launch(kernel, args, constants))

    with mock.patch.object(launch, "run", record), mock.patch.object(launch, "device_class", return_value=target):
        yield recorded


def compile_for(target: str, call: Launch) -> Any:
    """The compiled kernel, specialised as a launch would: aligned pointers, absent tensors, multiples of 16."""
    kernel, given = call.kernel, dict(zip(call.kernel.arg_names, call.args, strict=False)) | call.constants
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        specialised = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _triton_type(value)
        if isinstance(value, torch.Tensor) or (specialised and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    settings = {name: value for name, value in call.constants.items() if name not in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=settings)


def usage(compiled: Any) -> Usage:
    """Registers, spills, shared memory and whether the matrix units are used."""
    code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    registers, spilled = _amd(code) if "amdgcn" in compiled.asm else _nvidia(compiled.asm["cubin"])
    return Usage(registers, spilled, compiled.metadata.shared, TENSOR_CORE.search(code) is not None)


def _triton_type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers, and the bytes of local memory that a thread uses: these kernels have no arrays, so they are spills."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return found["REG"], found["STACK"]


def _amd(code: str) -> tuple[int, int]:
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s*(\d+)", code))
    return int(found["vgpr_count"]), int(found["vgpr_spill_count"])


@contextmanager
def private_cache() -> Iterator[None]:
    """Compile afresh: a cached result would hide what the installed compiler does."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": folder}):
        yield


class _NoDevice:
    """A Triton driver with a target and no device: kernels can be lowered, launching one fails."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no GPU here: the driver has no {name}")


@contextmanager
def stub_driver(target: str = "sm_90") -> Iterator[None]:
    """Let PyTorch trace launches for a target without a GPU of that kind."""
    driver = triton.runtime.driver
    with mock.patch.object(driver, "_active", _NoDevice(TARGETS[target])):
        yield
