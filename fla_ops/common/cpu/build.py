"""C++ kernels for a CPU, compiled for this machine at their first launch, as Triton's are for a GPU.

The compiler is `CXX`, or `c++`; GCC from version 12 on and Clang from 15 on know what the kernels use. What
it made is kept in `FLA_OPS_CACHE_DIR`, or in the user's cache folder, and serves from then on without a compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import signal
import struct
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fla_ops import validation as valid

from .cache import Unusable, obtain

PACKAGE = Path(__file__).parents[2]
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
MACHINES = {"AVX2": ("-march=x86-64-v3",), "AVX512": ("-march=x86-64-v4",)}  # by what PyTorch finds
LIMIT = 120.0  # seconds for a compiler
TOGETHER = 1 << 18  # multiply-adds from which a kernel takes all threads
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of kernels.h
RUNTIME = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")

_one_at_a_time = threading.Lock()


def library(source: str, *tensors: Tensor) -> ctypes.CDLL | None:
    """The shared library of a source file of this package; None where it does not compile or does not know the
    tensors' dtypes.
    """
    return _load(source) if all(x.dtype in DTYPES for x in tensors) else None


def sources() -> list[str]:
    """Every source file of this package that is compiled into a library."""
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/cpu/*.cpp"))


def warm() -> dict[str, bool]:
    """Compile what is not kept yet; whether each source file has a library now."""
    return {source: library(source) is not None for source in sources()}


@cache
def _load(source: str) -> ctypes.CDLL | None:
    flags = (*FLAGS, *MACHINES.get(torch.backends.cpu.get_cpu_capability(), ()))
    with _one_at_a_time:
        return _find(source, flags)


@cache
def _find(source: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library of a file, compiled where none is kept; None where that fails. A warning says what happened."""
    text = _text(source)
    digest = hashlib.sha256("\n".join((*flags, text)).encode()).hexdigest()[:16]
    notes: list[str] = []
    try:
        found = obtain(
            f"{Path(source).stem}-{digest}.so", exports(text), lambda path: _compile(text, flags, path), notes
        )
    except Unusable as error:
        message = "; ".join((*notes, str(error)))
        warnings.warn(f"fla_ops/{source} is served by ATen calls, more slowly: {message}", stacklevel=4)
        return None
    if notes:
        warnings.warn(f"fla_ops/{source} had to be compiled: {'; '.join(notes)}", stacklevel=4)
    found.use_threads(ctypes.byref(_runtime()))
    return found


def _compile(text: str, flags: tuple[str, ...], path: Path) -> None:
    named = os.environ.get("CXX") or "c++"
    try:
        command = [*shlex.split(named), *flags, "-x", "c++", "-", "-o", str(path)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise Unusable(f"there is no C++ compiler {named!r}, the one that CXX names or else c++ ({error})") from error
    with process:
        try:
            _, said = process.communicate(text, LIMIT)
        except subprocess.TimeoutExpired as error:
            raise Unusable(f"the compiler {named!r} had not finished after {LIMIT:.0f} s, and was stopped") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started: its session is its own
    if process.returncode:
        raise Unusable(f"the compiler {named!r} ended with status {process.returncode}\n{said.strip()[:2000]}")


def _text(source: str) -> str:
    """A file with this package's headers in place of their #include lines: the digest is of all that is compiled."""
    return re.sub(r'^#include "(.+)"$', lambda line: _text(line[1]), (PACKAGE / source).read_text(), flags=re.MULTILINE)


def exports(text: str) -> list[str]:
    """The functions that a source file declares to be C's."""
    blocks = re.findall(r'^extern "C" (?:\{\n(.*?)^\}|(.*?)$)', text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^\w+ (\w+)\(", "\n".join(map("".join, blocks)), re.MULTILINE)


class Runtime(ctypes.Structure):
    """Functions of an OpenMP runtime: struct Runtime of threads.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in RUNTIME)


@cache
def _runtime() -> Runtime:
    """The runtime that PyTorch depends on, whatever its file is called; nulls where it has no such functions."""
    pytorch = ctypes.CDLL(torch._C.__file__)  # is loaded already; a name is looked up in all that it depends on
    try:
        return Runtime(*(ctypes.cast(getattr(pytorch, name), ctypes.c_void_p) for name in RUNTIME))
    except AttributeError:
        return Runtime()


class Arguments(ctypes.Structure):
    """What a C++ function takes."""

    @classmethod
    def of(cls, *numbers: float) -> Self:
        """The structure that holds these numbers, packed at once: to make each part of it takes longer than a step."""
        return cls.from_buffer_copy(_packing(cls)(*numbers))


class Steps(ctypes.Structure):
    """A tensor [B, T, heads, width]: struct Steps of kernels.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("dtype", "sequence", "step", "head", "column")),
    )


class Walks(Arguments):
    """The arguments that a kernel along sequences begins with: struct Walks of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("time", "sequences", "key_heads", "heads", "K", "V")),
        *((name, ctypes.c_int64) for name in ("reverse", "threads")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("offsets", "slots")),
    )


NOTHING = (0,) * 6  # the numbers of a Steps without a tensor
CODES = {ctypes.c_int64: "q", ctypes.c_double: "d", ctypes.c_void_p: "P"}  # of the module struct


@cache
def _packing(kind: type[ctypes.Structure]) -> Callable[..., bytes]:
    return struct.Struct("".join(_codes(kind))).pack


def _codes(kind: type[ctypes.Structure]) -> Iterator[str]:
    for base in reversed(kind.mro()):
        for _, field in vars(base).get("_fields_", ()):
            yield from _codes(field) if issubclass(field, ctypes.Structure) else CODES[field]


def steps(*tensors: Tensor | None) -> list[int]:
    """The numbers of a Steps for each [B, T, heads, width]; zeros for None."""
    numbers: list[int] = []
    for x in tensors:
        numbers += NOTHING if x is None else (x.data_ptr(), DTYPES[x.dtype], *x.stride())
    return numbers


def one_step(*tensors: Tensor) -> list[int]:
    """The same for each [N, heads, width], as [N, 1, heads, width]."""
    numbers: list[int] = []
    for x in tensors:
        sequence, head, column = x.stride()
        numbers += (x.data_ptr(), DTYPES[x.dtype], sequence, 0, head, column)
    return numbers


def rows(*tensors: Tensor | None) -> list[int]:
    """The same for states [P, H, rows, width], whose rows are what steps are elsewhere."""
    numbers: list[int] = []
    for x in tensors:
        if x is None:
            numbers += NOTHING
        else:
            sequence, head, row, column = x.stride()
            numbers += (x.data_ptr(), DTYPES[x.dtype], sequence, row, head, column)
    return numbers


def addresses(*tensors: Tensor | None) -> list[int]:
    """Null for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def offsets(c: Any) -> Tensor | None:
    """Where the packed sequences of a call begin and end, checked, in int64; None for a dense batch."""
    return None if c.cu_seqlens is None else torch.tensor(valid.cu_seqlens_values(c.cu_seqlens, c[0].shape[1]))


def float32(x: Tensor | None) -> Tensor | None:
    """x contiguous and in float32: itself where it is both."""
    return None if x is None else x.float().contiguous()


def threads(products: int) -> int:
    """How many threads serve so many multiply-adds: as many as PyTorch uses, or one where starting them costs more, or
    where PyTorch has none to share.
    """
    return torch.get_num_threads() if products >= TOGETHER and _runtime().GOMP_parallel else 1


def for_each_head(x: Tensor, v: Tensor) -> Tensor:
    """For dq or dk: like x where its heads are not shared, else [B, T, H, K] in float32, to be summed."""
    if x.shape[2] == v.shape[2]:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty((*v.shape[:3], x.shape[3]), dtype=torch.float32)


def sum_groups(d: Tensor, x: Tensor) -> Tensor:
    """What for_each_head made, in the shape and dtype of x."""
    heads = x.shape[2]
    return d if d.shape[2] == heads else d.unflatten(2, (heads, -1)).sum(3).to(x.dtype)
