"""Public functions of causal_conv: the short convolution in front of a recurrence.

    o_t = act(bias + sum_i weight_i x_{t - W + 1 + i}),    i = 0 ... W - 1, for each channel on its own

H3 (arXiv 2212.14052), Mamba (arXiv 2312.00752), DeltaNet (arXiv 2406.06484). The steps before the first are those of a
state, or zeros. The state is the last W - 1 steps, channels first, as causal_conv1d has it.

Both functions raise ValueError for a wrong shape, device, width or activation, TypeError for a wrong dtype.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fla_ops.public import public

Activation = Literal["silu", "swish"]


@overload
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_state: Tensor | None = None,
    output_final_state: Literal[False] = False, activation: Activation | None = None,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_state: Tensor | None = None, *,
    output_final_state: Literal[True], activation: Activation | None = None,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, activation: Activation | None = None,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@public
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, activation: Activation | None = None,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The depthwise causal convolution of W taps, with its activation.

    Args:
        x: [B, T, D], float32, bfloat16 or float16, on a CPU also float64. Any strides, those
            of x.mT for x [B, D, T] included.
        weight: [D, W], W from 1 to 8; the last tap is that of the step itself. Any floating dtype, as bias [D] and the
            states: the arithmetic is float32 (float64 for float64 x).
        bias: added to every sum; None means zeros.
        initial_state: [N, D, W - 1], the steps before the first, oldest first; N = B, or the number of packed
            sequences; None means zeros.
        output_final_state: whether to return the last W - 1 steps, those of the state included.
        activation: None, or "silu", which "swish" means too.
        cu_seqlens: [N + 1] int32 or int64, offsets of sequences packed into a batch of 1; starts at 0, ends at
            T, never falls; a sequence may be empty, or shorter than the taps. On a GPU, where no value can be read
            back, wrong ones count as their running maximum from 0 to T. cu_seqlens_cpu: the same values on the host;
            results do not depend on it.

    Returns:
        o [B, T, D] in x's dtype, and the final state [N, D, W - 1] in float32 (float64 for float64) or None. A run that
        starts from it equals one that never stopped. Gradients flow to x, weight, bias and initial_state.
    """
    o, state = torch.ops.fla.causal_conv(
        x, weight, bias, initial_state, output_final_state, activation, cu_seqlens, cu_seqlens_cpu
    )
    return o, state


@public
def causal_conv_step_(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None,
    slots: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One step for N sequences whose last steps live in a pool, updated in place. For decoding; it has no gradient.

    Args:
        x: [N, D], the newest step. weight, bias, activation: as in causal_conv.
        state: the pool [P, D, S], the last S >= W - 1 steps, oldest first; float32, bfloat16 or float16 (float64 too
            for float64 x), any strides. They move on by one, and x is the newest. S = W - 1 continues causal_conv;
            the caches of transformers and of fla have S = W.
        slots: [N] int32 or int64, the row of each sequence; all different. -1 is padding: nothing is read or written
            for it and its output is zero. None means row n for sequence n, and P = N. A slot outside the pool is a
            ValueError on a CPU; a GPU, where no value can be read back, leaves the pool alone and fills that output
            row with NaN.

    Returns:
        o [N, D] in x's dtype.

    Raises:
        NotImplementedError: if a gradient is asked for.
    """
    o: Tensor = torch.ops.fla.causal_conv_step_(x, state, weight, bias, activation, slots)
    return o
