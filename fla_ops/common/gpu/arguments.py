"""What the simple_gla launchers share: contiguous arguments, the scale, and the refusal of float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops import validation as valid

WIDEST = 256  # of a state that one program holds


def scale_of(q: Tensor, scale: float | None) -> float:
    """K ** -0.5 unless given."""
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The kernels' strides follow from the sizes."""
    return [None if x is None else x.contiguous() for x in tensors]


def refuse_float64(q: Tensor) -> None:
    """The kernels compute in float32."""
    if q.dtype is torch.float64:
        raise TypeError("q, k, v must be float32, bfloat16 or float16 on a GPU, got float64")


def check_offsets(cu_seqlens: Tensor | None, time: int) -> None:
    """The values of cu_seqlens, without waiting for a device."""
    if cu_seqlens is None:
        return
    if cu_seqlens.is_cuda:
        valid.cu_seqlens_values_async(cu_seqlens, time)
    else:
        valid.cu_seqlens_values(cu_seqlens, time)


def final_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, state_v_first: bool) -> Tensor:
    """An empty final state, [N, H, K, V] or with state_v_first [N, H, V, K], float32."""
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    widths = (q.shape[3], v.shape[3])
    shape = (sequences, v.shape[2], *(widths[::-1] if state_v_first else widths))
    return torch.empty(shape, dtype=torch.float32, device=v.device)


def refuse_width(letter: str, width: int) -> None:
    """The forms that hold a whole column of the state in one program are bound in its height."""
    if width > WIDEST:
        raise ValueError(f"{letter} = {width} is over {WIDEST}: the state no longer fits one program")
