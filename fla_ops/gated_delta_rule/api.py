"""Public functions of the gated delta rule: a state that unlearns what it held for a key before it learns anew.

    S' = exp(g_t) S_{t-1},   u_t = beta_t (v_t - S'^T k_t),   S_t = S' + k_t u_t^T,   o_t = scale * S_t^T q_t

DeltaNet (arXiv 2406.06484) without a decay, Gated DeltaNet (arXiv 2412.06464) with one, as in Qwen3-Next. The chunkwise
form is derived in this folder's README.md.

`help(fla_ops.gated_delta_rule)` describes the arguments that the functions share. Every function raises ValueError for
a wrong shape, device or value, TypeError for a wrong dtype. Gradients flow to q, k, v, g, beta and initial_state;
forward-mode AD and double backward raise NotImplementedError.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fla_ops.dispatch import dispatcher
from fla_ops.public import public, steps_or_default

from .forms import FAMILY

Mode = Literal["auto", "chunk", "fused_recurrent"]


@overload
def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: Literal[False] = False,
    use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, *, output_final_state: Literal[True],
    use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@public
def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Chunkwise form: a triangular system for the steps of a chunk, a state from chunk to chunk. For training, prefill.

    Args:
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens,
            cu_seqlens_cpu: as `help(fla_ops.gated_delta_rule)` says.
        chunk_size: steps in a chunk, a power of two from 16 to 256; None means 64. A matter of speed, not of the
            result: an implementation may cut a chunk into smaller ones.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.
    """
    o, final_state = torch.ops.fla.chunk_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens,
        cu_seqlens_cpu, steps_or_default(chunk_size),
    )  # fmt: skip
    return o, final_state


@overload
def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: Literal[False] = False,
    use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, *, output_final_state: Literal[True],
    use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@public
def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The recurrence, step by step. For short sequences and decoding.

    Args:
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens,
            cu_seqlens_cpu: as `help(fla_ops.gated_delta_rule)` says.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.
    """
    o, final_state = torch.ops.fla.fused_recurrent_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens,
        cu_seqlens_cpu,
    )  # fmt: skip
    return o, final_state


@public
def gated_delta_rule_step_(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    slots: Tensor | None = None, use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False,
) -> Tensor:  # fmt: skip
    """One step for N sequences whose states live in a pool, updated in place. For decoding; it has no gradient.

    Args:
        q, k: [N, HK, K]. v: [N, H, V]. g, beta: [N, H]. scale, use_qk_l2norm_in_kernel: as
            `help(fla_ops.gated_delta_rule)` says.
        state: [P, H, K, V], or [P, H, V, K] with state_v_first=True; float32, bfloat16 or float16. The arithmetic is
            float32.
        slots: [N] int32 or int64, the pool row of each sequence; all different. -1 is padding: nothing is read or
            written for it and its output is zero. None means row n for sequence n, and P = N. A slot outside the
            pool is a ValueError.

    Returns:
        o [N, H, V] in v's dtype.

    Raises:
        NotImplementedError: if a gradient is asked for.
    """
    o: Tensor = torch.ops.fla.gated_delta_rule_step_(
        q, k, v, state, g, beta, scale, slots, use_qk_l2norm_in_kernel, state_v_first
    )
    return o


@overload
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: Literal[False] = False,
    use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64, mode: Mode = "auto",
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, *, output_final_state: Literal[True],
    use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64, mode: Mode = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64, mode: Mode = "auto",
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@dispatcher(FAMILY)
@public
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64, mode: Mode = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The form that suits the call: `fla_ops.explain(fla_ops.gated_delta_rule, ...)` says which.

    Args:
        q, k: [B, T, HK, K]. v: [B, T, H, V], with H a multiple of HK: each query/key head serves H // HK value
            heads. One floating dtype for all three.
        g: [B, T, H], the natural logarithm of the decay, usually <= 0 (-inf forgets the state). None means no decay.
        beta: [B, T, H], how much of the error v_t - S'^T k_t a step corrects: usually in [0, 1], or up to 2 for
            negative eigenvalues. With keys longer than unit vectors, beta * |k|^2 > 2 makes the recurrence grow.
        scale: factor on q; None means K ** -0.5.
        initial_state: [N, H, K, V] (N = B, or the number of packed sequences), any floating dtype; None means
            zeros. With state_v_first=True it and the final state are [N, H, V, K].
        output_final_state: whether to return the state after the last step, float32 (float64 for float64
            inputs).
        use_qk_l2norm_in_kernel: divide q and k by the root of their squared norm + 1e-6 first.
        cu_seqlens: [N + 1] int32 or int64, offsets of sequences packed into a batch of 1; starts at 0, ends at
            T, never falls; a sequence may be empty. On a GPU, where no value can be read back, wrong ones count as
            their running maximum from 0 to T. cu_seqlens_cpu: the same values on the host; results do not depend on it.
        chunk_size: steps in a chunk, a power of two from 16 to 256; None means 64. It changes the speed alone.
        mode: "auto", "chunk" or "fused_recurrent". A named form is used.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.

    Raises:
        ValueError: if mode is no form.
    """
    o, final_state = torch.ops.fla.gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens,
        cu_seqlens_cpu, steps_or_default(chunk_size), mode,
    )  # fmt: skip
    return o, final_state
