"""C++ kernels for a CPU, compiled for this machine at their first launch, as Triton's are for a GPU."""

from __future__ import annotations

import ctypes
import re
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fla_ops import validation as valid

PACKAGE = Path(__file__).parents[1]
FLAGS = ("-ffp-contract=fast", "-ftree-loop-vectorize")  # fused multiply-add, which Inductor turns off
TOGETHER = 1 << 18  # multiply-adds from which a kernel takes all threads
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of kernels.h


def library(source: str, *tensors: Tensor) -> ctypes.CDLL | None:
    """The shared library of a source file of this package; None where it does not compile or does not know the
    tensors' dtypes.
    """
    return _compile(source) if all(x.dtype in DTYPES for x in tensors) else None


@cache
def _compile(source: str) -> ctypes.CDLL | None:
    """With Inductor's compiler and its cache on disk: once per machine, compiler and source. None, with a warning,
    where that fails.
    """
    from torch._inductor.codecache import CppCodeCache

    try:
        compiled: ctypes.CDLL = CppCodeCache.load(_text(source), extra_flags=FLAGS)
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"fla_ops/{source} does not compile here (a C++ compiler is needed, as for torch.compile on a CPU): ATen "
            f"calls serve instead, more slowly. {str(error).strip()[:500]}",
            stacklevel=2,
        )
        return None
    return compiled


def _text(source: str) -> str:
    """A file with this package's headers in place of their #include lines, so that the cache sees their content."""
    return re.sub(r'^#include "(.+)"$', lambda line: _text(line[1]), (PACKAGE / source).read_text(), flags=re.MULTILINE)


class Steps(ctypes.Structure):
    """A tensor [B, T, heads, width]: struct Steps of kernels.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("dtype", "sequence", "step", "head", "column")),
    )


def steps(x: Tensor | None) -> Steps:
    """Zeros for None."""
    return Steps() if x is None else Steps(x.data_ptr(), DTYPES[x.dtype], *x.stride())


def address(x: Tensor | None) -> int | None:
    """Null for None."""
    return None if x is None else x.data_ptr()


def offsets(cu_seqlens: Tensor | None, q: Tensor) -> Tensor | None:
    """Where packed sequences begin and end, checked, in int64; None for a dense batch."""
    return None if cu_seqlens is None else torch.tensor(valid.cu_seqlens_values(cu_seqlens, q.shape[1]))


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
