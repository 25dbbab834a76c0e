"""What launchers of kernels share: contiguous arguments, offsets, states, and what the kernels refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid

WIDEST = 256  # of a state that one program holds


def contiguous(c: Any, but: tuple[str, ...] = ()) -> Any:
    """The same call with contiguous tensors, whose strides follow from the sizes; `but` those that are named."""
    return c._make(
        x.contiguous() if isinstance(x, Tensor) and name not in but else x
        for name, x in zip(c._fields, c, strict=True)
    )


def refuse_float64(x: Tensor, names: str = "q, k, v") -> None:
    """The kernels compute in float32."""
    if x.dtype is torch.float64:
        raise TypeError(f"{names} must be float32, bfloat16 or float16 on a GPU, got float64")


def check_offsets(c: Any, packed: str = "k") -> None:
    """The values of a call's cu_seqlens over the steps of a tensor, without waiting for a device."""
    if c.cu_seqlens is None:
        return
    time = getattr(c, packed).shape[1]
    if c.cu_seqlens.is_cuda:
        valid.cu_seqlens_values_async(c.cu_seqlens, time)
    else:
        valid.cu_seqlens_values(c.cu_seqlens, time)


def packed_sequences(cu_seqlens: Tensor | None) -> int:
    """How many sequences are packed; 0 for a dense batch."""
    return 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1


def final_state(c: Any) -> Tensor | None:
    """An empty final state in float32, if the call asks for it."""
    return torch.empty(c.state_shape, dtype=torch.float32, device=c.v.device) if c.output_final_state else None


def refuse_width(letter: str, width: int) -> None:
    """The forms that hold a whole column of the state in one program are bound in its height."""
    if width > WIDEST:
        raise ValueError(f"{letter} = {width} is over {WIDEST}: the state no longer fits one program")
