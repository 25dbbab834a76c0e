"""C++ kernels for a CPU, compiled for this machine at their first launch, as Triton's are for a GPU.

The compiler is `CXX`, or `c++`; GCC from version 12 on and Clang know the vector extensions that the kernels use. What
it made is kept in `FLA_OPS_CACHE_DIR`, or in the user's cache folder, and serves from then on without a compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid

PACKAGE = Path(__file__).parents[2]
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
MACHINES = {"AVX2": ("-march=x86-64-v3",), "AVX512": ("-march=x86-64-v4",)}  # by what PyTorch finds
TOGETHER = 1 << 18  # multiply-adds from which a kernel takes all threads
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of kernels.h


def library(source: str, *tensors: Tensor) -> ctypes.CDLL | None:
    """The shared library of a source file of this package; None where it does not compile or does not know the
    tensors' dtypes.
    """
    return _load(source) if all(x.dtype in DTYPES for x in tensors) else None


@cache
def _load(source: str) -> ctypes.CDLL | None:
    """The library of a file, compiled where there is none yet; None, with a warning, where that fails."""
    text = _text(source)
    flags = (*FLAGS, *MACHINES.get(torch.backends.cpu.get_cpu_capability(), ()))
    digest = hashlib.sha256("\n".join((*flags, text)).encode()).hexdigest()[:16]
    try:
        path = _folder() / f"{Path(source).stem}-{digest}.so"
        if not path.exists():
            _compile(text, flags, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"fla_ops/{source} could not be compiled; ATen calls serve instead, more slowly. Is there a C++ compiler, "
            f"by the name that CXX says, or c++?\n{said.strip()[:500]}",
            stacklevel=2,
        )
        return None


def _compile(text: str, flags: tuple[str, ...], path: Path) -> None:
    """Write a library in one step: processes that compile the same file at once do not see each other's halves."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [*shlex.split(os.environ.get("CXX", "c++")), *flags, "-x", "c++", "-", "-o", str(built)]
        subprocess.run(command, input=text, capture_output=True, text=True, check=True)
        built.replace(path)


def _folder() -> Path:
    """Where libraries are kept; one for this process where that cannot be made, or a user has no home."""
    named, caches = os.environ.get("FLA_OPS_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(named) if named else Path(caches or Path.home() / ".cache") / "fla_ops"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="fla_ops_"))
    return folder


def _text(source: str) -> str:
    """A file with this package's headers in place of their #include lines: the digest is of all that is compiled."""
    return re.sub(r'^#include "(.+)"$', lambda line: _text(line[1]), (PACKAGE / source).read_text(), flags=re.MULTILINE)


class Steps(ctypes.Structure):
    """A tensor [B, T, heads, width]: struct Steps of kernels.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("dtype", "sequence", "step", "head", "column")),
    )


class Walks(ctypes.Structure):
    """The arguments that a kernel along sequences begins with: struct Walks of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("time", "sequences", "key_heads", "heads", "K", "V")),
        *((name, ctypes.c_int64) for name in ("reverse", "threads")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("offsets", "slots")),
    )


def steps(x: Tensor | None) -> Steps:
    """Zeros for None."""
    return Steps() if x is None else Steps(x.data_ptr(), DTYPES[x.dtype], *x.stride())


def address(x: Tensor | None) -> int | None:
    """Null for None."""
    return None if x is None else x.data_ptr()


def offsets(c: Any) -> Tensor | None:
    """Where the packed sequences of a call begin and end, checked, in int64; None for a dense batch."""
    return None if c.cu_seqlens is None else torch.tensor(valid.cu_seqlens_values(c.cu_seqlens, c.q.shape[1]))


def float32(x: Tensor | None) -> Tensor | None:
    """x contiguous and in float32: itself where it is both."""
    return None if x is None else x.float().contiguous()


def threads(products: int) -> int:
    """How many threads serve so many multiply-adds: as many as PyTorch uses, or one where starting them costs more."""
    return torch.get_num_threads() if products >= TOGETHER else 1


def for_each_head(x: Tensor, v: Tensor) -> Tensor:
    """For dq or dk: like x where its heads are not shared, else [B, T, H, K] in float32, to be summed."""
    if x.shape[2] == v.shape[2]:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty((*v.shape[:3], x.shape[3]), dtype=torch.float32)


def sum_groups(d: Tensor, x: Tensor) -> Tensor:
    """What for_each_head made, in the shape and dtype of x."""
    heads = x.shape[2]
    return d if d.shape[2] == heads else d.unflatten(2, (heads, -1)).sum(3).to(x.dtype)
