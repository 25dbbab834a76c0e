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
# A matrix instruction, and what says how it reads its operands.
INSTRUCTION = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_)[\w.:]*")
READ_AS = {
    "tf32": re.compile(r"tf32|_xf32"),
    "half": re.compile(r"\.bf16|\.f16|kind::f16|_bf16|_f16\b|x\d+f16"),
    "float32": re.compile(r"v_mfma_f32_\d+x\d+x\d+(?:_\d+b)?_?f32"),
}
PRODUCT = re.compile(
    r"tt\.dot .*?(?:inputPrecision = (?P<precision>\w+))? : tensor<(?:\d+x)+(?P<left>\w+)[,>].*? \* "
    r"tensor<(?:\d+x)+(?P<right>\w+)[,>]"
)
# In the last form of Triton's own code, where a product of float32 operands in tf32 is one of these.
LOWERED_TF32 = re.compile(
    r"tt\.dot .*?inputPrecision = tf32 : tensor<(?:\d+x)+f32,"
    r"|(?:warp_group_dot|tc_gen5_mma) .*? : (?:!ttg\.memdesc|tensor)<(?:\d+x)+f32,"
)
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
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


@dataclass(frozen=True)
class Products:
    """The matrix products of a compiled kernel.

    asked   operands and precision of every product, as Triton's first form of the kernel has them
    read    how the matrix instructions of the machine code read their operands: "half", "tf32", "float32"
    parts   how many products in tf32 there are for each of float32 that the kernel asks for
    """

    asked: frozenset[tuple[str, str]]
    read: frozenset[str]
    parts: float


Specialisation = tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]], dict[str, Any]]


@contextmanager
def launches(target: str) -> Iterator[list[Launch]]:
    """Record the launches made inside, with the settings for `target`, instead of making them."""
    recorded: list[Launch] = []

    def record(kernel: Any, _: int, *args: Any, **constants: Any) -> None:
        recorded.append(Launch(kernel, args, constants))

    with launch.elsewhere(target, record):
        yield recorded


def specialise(call: Launch) -> Specialisation:
    """What a launch is compiled for: the kernel, its argument types, constants, multiples of 16, and options. As
    Triton does: pointers are aligned, an absent tensor and an integer of 1 are constants.
    """
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
    options = {name: value for name, value in call.constants.items() if name not in signature}
    return kernel, signature, constants, attributes, options


# Sizes on which a kernel's tile does not depend, and the blocks that a width is cut into.
SIZES = ("H", "HK", "HQ", "HV", "WIDTH")
BLOCKS = {"K": ("BK", "BU"), "V": ("BV", "BU"), "U": ("BU",), "M": ("BM",), "D": ("BD",)}


def shape_of(call: Launch) -> tuple[Any, ...]:
    """What decides how many registers and how much memory a launch takes: its kernel, the types and presence of its
    arguments, blocks and flags, and whether a width fills one block, has more, or leaves a part of one empty.
    """
    _, signature, constants, _, options = specialise(call)
    shape = {name: value for name, value in constants.items() if name not in (*SIZES, *BLOCKS)}
    for name, blocks in BLOCKS.items():
        block = next((constants[b] for b in blocks if b in constants), None)
        if name in constants and block is not None:
            shape[name] = (constants[name] > block, constants[name] % block == 0)
    return call.kernel.__name__, tuple(signature.items()), tuple(sorted(shape.items())), tuple(sorted(options.items()))


def compile_for(target: str, call: Launch) -> Any:
    """The compiled kernel."""
    kernel, signature, constants, attributes, options = specialise(call)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def usage(compiled: Any) -> Usage:
    """Registers, spills and shared memory."""
    amd = compiled.asm.get("amdgcn")
    registers, spilled = _nvidia(compiled.asm["cubin"]) if amd is None else _amd(amd)
    return Usage(registers, spilled, compiled.metadata.shared)


def products(compiled: Any) -> Products:
    """What the kernel asks of the matrix units, and what became of it."""
    found = list(PRODUCT.finditer(compiled.asm["ttir"]))
    if len(found) != len(re.findall(r"= tt\.dot", compiled.asm["ttir"])):
        raise ValueError("the compiler writes its products in a way that this module does not read")
    asked = [(x["left"], x["precision"] or "ieee") for x in found]
    wide = [x for x in asked if x[0] == "f32"]
    code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    read = set()
    for instruction in set(INSTRUCTION.findall(code)):
        read |= {kind for kind, pattern in READ_AS.items() if pattern.search(instruction)} or {instruction}
    lowered = len(LOWERED_TF32.findall(compiled.asm["ttgir"]))
    return Products(frozenset(asked), frozenset(read), lowered / len(wide) if wide else 0.0)


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
def private_cache() -> Iterator[Path]:
    """Compile afresh: a cached result would hide what the installed compiler does. The folder that is compiled into."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": folder}):
        yield Path(folder)


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
