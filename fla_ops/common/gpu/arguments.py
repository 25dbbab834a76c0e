"""What launchers of kernels share: contiguous arguments, offsets, states, and what the kernels refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid

from .offsets import followed

WIDEST = 256  # of a state that one program holds


OFFSETS = {"cu_seqlens": "T", "cu_seqlens_k": "TK"}  # and the axis that they cut


def contiguous(c: Any, but: tuple[str, ...] = ()) -> Any:
    """The same call with contiguous tensors, whose strides follow from the sizes, `but` those that are named; and with
    offsets that lead nowhere outside. On the host wrong ones are refused.
    """
    found = c._make(
        x.contiguous() if isinstance(x, Tensor) and name not in but else x
        for name, x in zip(c._fields, c, strict=True)
    )
    given = {name: x for name in OFFSETS if (x := getattr(c, name, None)) is not None}
    return found._replace(**{name: _checked(x, _steps(c, OFFSETS[name])) for name, x in given.items()})


def _checked(offsets: Tensor, time: int) -> Tensor:
    if offsets.is_cuda:
        return followed(offsets, time)
    valid.cu_seqlens_values(offsets, time)
    return offsets


def _steps(c: Any, letter: str) -> int:
    """The size of an axis of time."""
    return next(
        x.shape[1]
        for name, letters in c.axes.items()
        if letters.split()[1:2] == [letter] and isinstance(x := getattr(c, name, None), Tensor)
    )


def refuse_float64(x: Tensor, names: str = "q, k, v") -> None:
    """The kernels compute in float32."""
    if x.dtype is torch.float64:
        raise TypeError(f"{names} must be float32, bfloat16 or float16 on a GPU, got float64")


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
