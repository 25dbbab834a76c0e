"""Public functions of ssd, Mamba-2 between its projections, by mamba_ssm's argument names.

    dt_t = clamp(softplus(dt_t + dt_bias))
    S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T,    o_t = (S_t C_t + D x_t) silu(z_t)

"Transformers are SSMs" (arXiv 2405.21060). The letters are those of the other families: V is the width of a head (P
there), K that of the state (N there), HK the groups of B and C. Both functions raise ValueError for a wrong shape or
device, TypeError for a wrong dtype.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from fla_ops.public import public, steps_or_default

Mode = Literal["auto", "chunk", "fused_chunk", "fused_recurrent", "parallel"]
NO_LIMIT = (0.0, math.inf)


@overload
def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None, output_final_state: Literal[False] = False, seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
    mode: Mode = "auto",
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None, *, output_final_state: Literal[True], seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
    mode: Mode = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None, output_final_state: bool = False, seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
    mode: Mode = "auto",
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@public
def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None, output_final_state: bool = False, seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
    mode: Mode = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Mamba-2 over whole sequences: the scan, its step sizes, the skip connection and the gate.

    Args:
        x: [B, T, H, V]. B, C: [B, T, HK, K], with H a multiple of HK: each group serves H // HK heads. One floating
            dtype for all three; all else may have any.
        dt: [B, T, H], step sizes before dt_bias, softplus and limits. A: [H], negative: A dt is the natural logarithm
            of the decay.
        D: [H] or [H, V], the weight of x in the output; None means zeros.
        z: [B, T, H, V], whose silu multiplies the output; None means no gate.
        dt_bias: [H], added to dt. dt_softplus: whether the sum goes through softplus. dt_limit: what it is clamped to.
        initial_state: [N, H, V, K]; N = B, or the number of packed sequences; None means zeros.
        output_final_state: whether to return the state after the last step, float32 (float64 for float64).
        seq_idx: [B, T] int32 or int64: a state ends where the number changes. The initial state is sequence 0's. Not
            beside cu_seqlens.
        cu_seqlens: [N + 1] int32 or int64, offsets of sequences packed into a batch of 1; starts at 0, ends at
            T, never falls; a sequence may be empty. cu_seqlens_cpu: the same values on the host.
        chunk_size, mode: as `help(fla_ops.simple_gla)` says.

    Returns:
        o [B, T, H, V] in x's dtype, and the final state [N, H, V, K] or None. Gradients flow to every floating input.
    """
    least, most = dt_limit
    sizes = (dt_bias, dt_softplus, least, None if most == math.inf else most)
    packing, steps = (seq_idx, cu_seqlens, cu_seqlens_cpu), steps_or_default(chunk_size)
    o, state = torch.ops.fla.ssd(x, dt, A, B, C, D, z, *sizes, initial_state, output_final_state, *packing, steps, mode)
    return o, state


@public
def ssd_step_(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False, slots: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One step for N sequences whose states live in a pool, updated in place. For decoding; it has no gradient.

    Args:
        x: [N, H, V]. dt: [N, H]. A: [H]. B, C: [N, HK, K]. D, z, dt_bias, dt_softplus: as in ssd; a dt below zero
            counts as zero.
        state: the pool [P, H, V, K], float32, bfloat16 or float16; the arithmetic is float32.
        slots: [N] int32 or int64, the row of each sequence; all different. -1 is padding: nothing is read or written
            for it and its output is zero. None means row n for sequence n, and P = N.

    Returns:
        o [N, H, V] in x's dtype.

    Raises:
        NotImplementedError: if a gradient is asked for.
    """
    o: Tensor = torch.ops.fla.ssd_step_(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus, slots)
    return o
