"""Public functions of linear_attn: linear attention without decay, optionally normalised.

    S_t = S_{t-1} + k_t v_t^T,    z_t = z_{t-1} + k_t
    o_t = scale * S_t^T q_t                                       normalize=False
    o_t = scale * S_t^T q_t / (scale * q_t . z_t + 1e-10)         normalize=True

"Transformers are RNNs" (arXiv 2006.16236). With normalize=True the weights of a step sum to one, as softmax's do; for
that q and k must come out of a feature map with no negative values, such as elu(x) + 1, which is the caller's.

`help(fla_ops.linear_attn)` describes the arguments that the functions share. Every function raises ValueError for a
wrong shape, device or value, TypeError for a wrong dtype. Gradients flow to q, k, v and both parts of initial_state;
forward-mode AD and double backward raise NotImplementedError.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fla_ops.dispatch import dispatcher
from fla_ops.public import public, steps_or_default

from .forms import FAMILY

Mode = Literal["auto", "chunk", "fused_chunk", "fused_recurrent"]
State = Tensor | tuple[Tensor, Tensor] | None


def _parts(initial_state: State) -> tuple[Tensor | None, Tensor | None]:
    """kv and z. What fits `normalize` is checked by the operator."""
    if not isinstance(initial_state, tuple | list):
        return initial_state, None
    for part in initial_state:
        if not isinstance(part, Tensor | None):
            raise TypeError(f"initial_state must hold tensors, kv and z, got {type(part).__name__}")
    if len(initial_state) != 2:
        raise ValueError(
            f"initial_state must be kv [N, H, K, V] or a pair (kv, z [N, 1, H, K]), got {len(initial_state)} parts"
        )
    return initial_state[0], initial_state[1]


def _split_state(initial_state: State = None, **others: Any) -> dict[str, Any]:
    """The operator's arguments from the public ones."""
    kv, z = _parts(initial_state)
    return {**others, "initial_state": kv, "initial_z": z}


def _returned(result: Any) -> tuple[Tensor, State]:
    """The operator's (o, kv, z) as o and the state."""
    o, kv, z = result
    return o, kv if z is None else (kv, z)


@overload
def chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None,
    output_final_state: Literal[False] = False, normalize: bool = True, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None, *,
    output_final_state: Literal[True], normalize: Literal[True] = True, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...  # fmt: skip
@overload
def chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None, *,
    output_final_state: Literal[True], normalize: Literal[False], cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None,
    output_final_state: bool = False, normalize: bool = True, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, State]: ...  # fmt: skip
@public
def chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None,
    output_final_state: bool = False, normalize: bool = True, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, State]:  # fmt: skip
    """Chunkwise form: a state pass over the chunks, then all chunks in parallel. For training and prefill.

    Args:
        q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, cu_seqlens_cpu: as
            `help(fla_ops.linear_attn)` says.
        chunk_size: steps in a chunk, a power of two from 16 to 256. A matter of speed, not of the result.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.
    """
    states, packing = (*_parts(initial_state), output_final_state), (cu_seqlens, cu_seqlens_cpu)
    steps = steps_or_default(chunk_size)
    return _returned(torch.ops.fla.chunk_linear_attn(q, k, v, scale, *states, normalize, *packing, steps))


@overload
def fused_chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None,
    output_final_state: Literal[False] = False, normalize: bool = True, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def fused_chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None, *,
    output_final_state: Literal[True], normalize: Literal[True] = True, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...  # fmt: skip
@overload
def fused_chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None, *,
    output_final_state: Literal[True], normalize: Literal[False], cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def fused_chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None,
    output_final_state: bool = False, normalize: bool = True, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, State]: ...  # fmt: skip
@public
def fused_chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None,
    output_final_state: bool = False, normalize: bool = True, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, State]:  # fmt: skip
    """Chunkwise form in one pass: each sequence and head walks its chunks with the state at hand. For many heads, or
    little memory.

    Arguments and results are chunk_linear_attn's.
    """
    states, packing = (*_parts(initial_state), output_final_state), (cu_seqlens, cu_seqlens_cpu)
    steps = steps_or_default(chunk_size)
    return _returned(torch.ops.fla.fused_chunk_linear_attn(q, k, v, scale, *states, normalize, *packing, steps))


@overload
def fused_recurrent_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None,
    output_final_state: Literal[False] = False, reverse: bool = False, normalize: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def fused_recurrent_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None, *,
    output_final_state: Literal[True], reverse: bool = False, normalize: Literal[False] = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def fused_recurrent_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None, *,
    output_final_state: Literal[True], reverse: bool = False, normalize: Literal[True],
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...  # fmt: skip
@overload
def fused_recurrent_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None,
    output_final_state: bool = False, reverse: bool = False, normalize: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, State]: ...  # fmt: skip
@public
def fused_recurrent_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None,
    output_final_state: bool = False, reverse: bool = False, normalize: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, State]:  # fmt: skip
    """The recurrence, step by step. For short sequences. Mind that normalize is False unless given.

    Args:
        q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, cu_seqlens_cpu: as
            `help(fla_ops.linear_attn)` says.
        reverse: run time backwards, S_t = S_{t+1} + k_t v_t^T and z_t = z_{t+1} + k_t; the final state is the one after
            step 0.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.
    """
    states, packing = (*_parts(initial_state), output_final_state), (cu_seqlens, cu_seqlens_cpu)
    return _returned(torch.ops.fla.fused_recurrent_linear_attn(q, k, v, scale, *states, reverse, normalize, *packing))


@public
def normalize_output(
    q: Tensor, k: Tensor, o: Tensor, scale: float | None = 1.0, initial_z: Tensor | None = None,
    output_final_z: bool = False, reverse: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The divide step alone: o_t / (scale * q_t . z_t + 1e-10), with z_t the running sum of k.

    Args:
        q, k: [B, T, HK, K]. o: [B, T, H, V], what was read out. One floating dtype for all three.
        scale: factor on q, the one that o was read out with; 1 unless given, for a q that is scaled already. None
            means K ** -0.5.
        initial_z: [N, 1, H, K], the sum before the first step; None means zeros.
        output_final_z: also return the sum after the last step.
        reverse: run time backwards, z_t = z_{t+1} + k_t.
        cu_seqlens, cu_seqlens_cpu: as `help(fla_ops.linear_attn)` says.

    Returns:
        The quotient [B, T, H, V] in o's dtype; with output_final_z=True also z [N, 1, H, K], float32 (float64 for
        float64). Gradients flow to q, k, o and initial_z.
    """
    normalized, final_z = torch.ops.fla.normalize_output(
        q, k, o, scale, initial_z, output_final_z, reverse, cu_seqlens, cu_seqlens_cpu
    )
    return (normalized, final_z) if output_final_z else normalized


@public
def linear_attn_step_(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor | None = None, scale: float | None = None,
    slots: Tensor | None = None, state_v_first: bool = False,
) -> Tensor:  # fmt: skip
    """One step for N sequences whose states live in pools, updated in place. For decoding; it has no gradient.

    Args:
        q, k: [N, HK, K]. v: [N, H, V]. scale: as `help(fla_ops.linear_attn)` says.
        state: the pool of kv, [P, H, K, V], or [P, H, V, K] with state_v_first=True; float32, bfloat16 or float16. The
            arithmetic is float32.
        z: the pool of z, [P, 1, H, K], likewise; given, the output is normalised. A half-precision z stops growing
            once it is 256 (bfloat16) or 2048 (float16) times as large as a key: float32 is the choice.
        slots: [N] int32 or int64, the row of each sequence in both pools; all different. -1 is padding: nothing is read
            or written for it and its output is zero. None means row n for sequence n, and P = N. A slot outside the
            pool is a ValueError on a CPU; a GPU, where no value can be read back, leaves the pools alone and fills that
            output row with NaN.

    Returns:
        o [N, H, V] in v's dtype.

    Raises:
        NotImplementedError: if a gradient is asked for.
    """
    o: Tensor
    if z is None:
        o = torch.ops.fla.simple_gla_step_(q, k, v, state, None, None, scale, slots, state_v_first)
    else:
        o = torch.ops.fla.linear_attn_step_(q, k, v, state, z, scale, slots, state_v_first)
    return o


@overload
def linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None,
    output_final_state: Literal[False] = False, normalize: bool = True, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64, reverse: bool = False, mode: Mode = "auto",
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None, *,
    output_final_state: Literal[True], normalize: Literal[True] = True, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64, reverse: bool = False, mode: Mode = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...  # fmt: skip
@overload
def linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None, *,
    output_final_state: Literal[True], normalize: Literal[False], cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64, reverse: bool = False, mode: Mode = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None,
    output_final_state: bool = False, normalize: bool = True, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64, reverse: bool = False, mode: Mode = "auto",
) -> tuple[Tensor, State]: ...  # fmt: skip
@dispatcher(FAMILY, arguments=_split_state)
@public
def linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: State = None,
    output_final_state: bool = False, normalize: bool = True, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64, reverse: bool = False, mode: Mode = "auto",
) -> tuple[Tensor, State]:  # fmt: skip
    """The form that suits the call: `fla_ops.explain(fla_ops.linear_attn, ...)` says which, and why not the others.

    Args:
        q, k: [B, T, HK, K]. v: [B, T, H, V], with H a multiple of HK: each query/key head serves H // HK value
            heads. One floating dtype for all three.
        scale: factor on q; None means K ** -0.5. With normalize=True it matters only beside the 1e-10.
        initial_state: with normalize=True a pair (kv [N, H, K, V], z [N, 1, H, K]), otherwise kv alone; N = B,
            or the number of packed sequences; any floating dtypes; None means zeros.
        output_final_state: whether to return the state after the last step, in the form of initial_state;
            float32 (float64 for float64 inputs). A run that starts from it equals one that never stopped.
        normalize: whether to divide.
        cu_seqlens: [N + 1] int32 or int64, offsets of sequences packed into a batch of 1; starts at 0, ends at
            T, never falls; a sequence may be empty. On a GPU, where no value can be read back, wrong ones count as
            their running maximum from 0 to T. cu_seqlens_cpu: the same values on the host; results do not depend on it.
        chunk_size: steps in a chunk, a power of two from 16 to 256; None means 64. It changes the speed alone.
        reverse: run time backwards; the final state is the one after step 0.
        mode: "auto", or one of "chunk", "fused_chunk", "fused_recurrent". A named form is used or refused.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.

    Raises:
        ValueError: if mode is no form.
        NotImplementedError: if the named form cannot serve the call, with its reasons.
    """
    states, packing = (*_parts(initial_state), output_final_state), (cu_seqlens, cu_seqlens_cpu)
    steps = steps_or_default(chunk_size)
    return _returned(torch.ops.fla.linear_attn(q, k, v, scale, *states, normalize, *packing, steps, reverse, mode))
