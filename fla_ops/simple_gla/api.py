"""Public functions of simple_gla: linear attention with one scalar decay per head.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,    o_t = scale * S_t^T q_t

RetNet (arXiv 2307.08621) with a constant decay, Mamba-2 (arXiv 2405.21060) and gated RFA (arXiv 2103.02143) with a
data-dependent one. The chunkwise form is derived in this folder's README.md.

`help(fla_ops.simple_gla)` describes the arguments that the functions share. Every function raises ValueError for a
wrong shape, device or value, TypeError for a wrong dtype. Gradients flow to q, k, v, g, g_gamma and initial_state;
forward-mode AD and double backward raise NotImplementedError.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fla_ops.dispatch import dispatcher
from fla_ops.public import public, steps_or_default

from .forms import FAMILY

Mode = Literal["auto", "chunk", "fused_chunk", "fused_recurrent", "parallel"]


@overload
def chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: Literal[False] = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64, *, reverse: bool = False,
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, *, output_final_state: Literal[True],
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64, reverse: bool = False,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64, *, reverse: bool = False,
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@public
def chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64, *, reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Chunkwise form: a state pass over the chunks, then all chunks in parallel. For training and prefill.

    Args:
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, cu_seqlens_cpu:
            as `help(fla_ops.simple_gla)` says.
        chunk_size: steps in a chunk, a power of two from 16 to 256. A matter of speed, not of the result: a kernel
            may cut a chunk into smaller tiles.
        reverse: run time backwards, S_t = exp(g_t) S_{t+1} + k_t v_t^T; the final state is the one after step 0.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.
    """
    o, final_state = torch.ops.fla.chunk_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, cu_seqlens_cpu,
        steps_or_default(chunk_size), reverse,
    )  # fmt: skip
    return o, final_state


@overload
def fused_chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: Literal[False] = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64, *, reverse: bool = False,
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def fused_chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, *, output_final_state: Literal[True],
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64, reverse: bool = False,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def fused_chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64, *, reverse: bool = False,
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@public
def fused_chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64, *, reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Chunkwise form in one pass: each sequence and head walks its chunks with the state at hand. For many heads, or
    little memory.

    Arguments and results are chunk_simple_gla's.
    """
    o, final_state = torch.ops.fla.fused_chunk_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, cu_seqlens_cpu,
        steps_or_default(chunk_size), reverse,
    )  # fmt: skip
    return o, final_state


@overload
def fused_recurrent_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: Literal[False] = False,
    reverse: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def fused_recurrent_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, *, output_final_state: Literal[True],
    reverse: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def fused_recurrent_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    reverse: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@public
def fused_recurrent_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    reverse: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The recurrence, step by step. For short sequences and decoding.

    Args:
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, cu_seqlens_cpu:
            as `help(fla_ops.simple_gla)` says.
        reverse: run time backwards, S_t = exp(g_t) S_{t+1} + k_t v_t^T; the final state is the one after step 0.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.
    """
    o, final_state = torch.ops.fla.fused_recurrent_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, reverse, state_v_first, cu_seqlens,
        cu_seqlens_cpu,
    )  # fmt: skip
    return o, final_state


@public
def parallel_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None,
    output_attentions: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    g_gamma: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Quadratic form, without a state: o_i = sum_{j <= i} attn_ij v_j. For short sequences, or to look at the weights.

    Args:
        q, k, v, g, g_gamma, scale, cu_seqlens, cu_seqlens_cpu: as `help(fla_ops.simple_gla)` says.
        output_attentions: also return attn_ij = scale * exp(G_i - G_j) q_i . k_j for j <= i in one sequence, else 0,
            with G the running sum of g.

    Returns:
        o [B, T, H, V] and attn [B, H, T, T] (or None), both in v's dtype.
    """
    o, attn = torch.ops.fla.parallel_simple_gla(
        q, k, v, g, g_gamma, scale, output_attentions, cu_seqlens, cu_seqlens_cpu
    )
    return o, attn


@public
def simple_gla_step_(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, slots: Tensor | None = None, state_v_first: bool = False,
) -> Tensor:  # fmt: skip
    """One step for N sequences whose states live in a pool, updated in place. For decoding; it has no gradient.

    Args:
        q, k: [N, HK, K]. v: [N, H, V]. g: [N, H]. g_gamma: [H]. scale: as `help(fla_ops.simple_gla)` says.
        state: [P, H, K, V], or [P, H, V, K] with state_v_first=True; float32, bfloat16 or float16. The arithmetic is
            float32.
        slots: [N] int32 or int64, the pool row of each sequence; all different. -1 is padding: nothing is read or
            written for it and its output is zero. None means row n for sequence n, and P = N. A slot outside the
            pool is a ValueError on a CPU; a GPU, where no value can be read back, leaves the pool alone and fills
            that output row with NaN.

    Returns:
        o [N, H, V] in v's dtype.

    Raises:
        NotImplementedError: if a gradient is asked for.
    """
    o: Tensor = torch.ops.fla.simple_gla_step_(q, k, v, state, g, g_gamma, scale, slots, state_v_first)
    return o


@public
def simple_gla_states(
    k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None, initial_state: Tensor | None = None,
    every: int = 64, q: Tensor | None = None, scale: float | None = None, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
    at: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """The states of each sequence after every few steps, or after given numbers of them, for caches of prefixes; the
    outputs too where q is given. It has no gradient.

    After a multiple of chunk_size steps, a state is equal, bit for bit, to the final state of chunk_simple_gla over so
    many; and a run of it that starts from there, with the same chunk_size, equals one that did not stop, bit for bit.
    After another number of steps, both are equal up to rounding.

    Args:
        k, v, g, g_gamma, initial_state, scale, state_v_first, cu_seqlens, cu_seqlens_cpu: as
            `help(fla_ops.simple_gla)` says.
        every: steps from one state that is kept to the next, counted from each sequence's start; a multiple of
            chunk_size.
        q: [B, T, HK, K]; None means that no outputs are wanted.
        chunk_size: as in chunk_simple_gla.
        at: [N, A] int32 or int64, given instead of `every`: state a of sequence n is the one after its first at[n, a]
            steps, in any order, 0 for the initial state. Where the sequence has not so many, and for -1, it is zeros.

    Returns:
        o [B, T, H, V] in v's dtype, or None without q.
        states [C, H, K, V] in float32 (float64 for float64 inputs), C = B * (T // every). The states of one sequence
            follow those of the one before; a sequence of L steps has L // every. Packed sequences may have fewer in all
            than C: rows past the last are zeros. With `at` they are [N, A, H, K, V].
        final_state [N, H, K, V], likewise. With state_v_first=True both are [..., V, K].

    Raises:
        NotImplementedError: if a gradient is asked for.
    """
    o, states, final_state = torch.ops.fla.simple_gla_states(
        k, v, g, g_gamma, initial_state, every, q, scale, state_v_first, cu_seqlens, cu_seqlens_cpu,
        steps_or_default(chunk_size), at,
    )  # fmt: skip
    return o, states, final_state


@public
def simple_gla_advance_(
    k: Tensor, v: Tensor, state: Tensor, accepted: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    slots: Tensor | None = None, state_v_first: bool = False,
) -> None:  # fmt: skip
    """The first few of T steps for N sequences whose states live in a pool, updated in place, without outputs: what is
    kept of drafted tokens. It has no gradient.

    Equal to as many calls of simple_gla_step_, on a CPU bit for bit in a float32 pool. A half-precision pool is rounded
    once, at the end.

    Args:
        k: [N, T, HK, K]. v: [N, T, H, V]. g: [N, T, H]. g_gamma: [H]. As `help(fla_ops.simple_gla)` says.
        state: [P, H, K, V], or [P, H, V, K] with state_v_first=True; float32, bfloat16 or float16. The arithmetic is
            float32.
        accepted: [N] int32 or int64, how many steps each sequence takes, from 0 to T. Another number is a ValueError on
            a CPU; on a GPU, where no value can be read back, one below 0 counts as 0, and one above T as T.
        slots: [N] int32 or int64, the pool row of each sequence; all different. -1 is padding: nothing is read or
            written for it. None means row n for sequence n, and P = N. A slot outside the pool is a ValueError on a
            CPU; a GPU leaves the pool alone.

    Raises:
        NotImplementedError: if a gradient is asked for.
    """
    torch.ops.fla.simple_gla_advance_(k, v, state, accepted, g, g_gamma, slots, state_v_first)


@public
def simple_gla_prefill_(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, slots: Tensor | None = None, fresh: Tensor | None = None,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64,
) -> Tensor:  # fmt: skip
    """Sequences of any lengths whose states live in a pool: each starts from its row, which then holds its final state.
    For prompts, pieces of prompts and single tokens in one call; it has no gradient.

    Equal, bit for bit, to chunk_simple_gla from the rows' states, with what it returns put back into the rows.

    Args:
        q, k, v, g, g_gamma, scale, cu_seqlens, cu_seqlens_cpu: as `help(fla_ops.simple_gla)` says.
        state: [P, H, K, V], or [P, H, V, K] with state_v_first=True; float32, bfloat16 or float16. The arithmetic is
            float32, and a row is rounded once, at the end.
        slots: [N] int32 or int64, the pool row of each sequence; all different. -1 is padding: nothing is read or
            written for it and its output is zero. None means row n for sequence n, and P = N. A slot outside the
            pool is a ValueError on a CPU; a GPU, where no value can be read back, leaves the pool alone and fills
            that sequence's output with NaN.
        fresh: [N] bool, which sequences start from zeros, whatever their rows hold (NaN too). None means that none
            does. A sequence without steps leaves its row alone, or zeros it if it is fresh.
        chunk_size: as in chunk_simple_gla.

    Returns:
        o [B, T, H, V] in v's dtype.

    Raises:
        NotImplementedError: if a gradient is asked for.
    """
    o: Tensor = torch.ops.fla.simple_gla_prefill_(
        q, k, v, state, g, g_gamma, scale, slots, fresh, state_v_first, cu_seqlens, cu_seqlens_cpu,
        steps_or_default(chunk_size),
    )  # fmt: skip
    return o


@overload
def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: Literal[False] = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64, reverse: bool = False, mode: Mode = "auto",
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, *, output_final_state: Literal[True],
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64, reverse: bool = False, mode: Mode = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64, reverse: bool = False, mode: Mode = "auto",
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@dispatcher(FAMILY)
@public
def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64, reverse: bool = False, mode: Mode = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The form that suits the call: `fla_ops.explain(fla_ops.simple_gla, ...)` says which, and why not the others.

    Args:
        q, k: [B, T, HK, K]. v: [B, T, H, V], with H a multiple of HK: each query/key head serves H // HK value
            heads. One floating dtype for all three.
        g: [B, T, H], the natural logarithm of the decay, usually <= 0 (-inf forgets the state). g_gamma: [H],
            the same for every step. At most one of them; neither means no decay.
        scale: factor on q; None means K ** -0.5.
        initial_state: [N, H, K, V] (N = B, or the number of packed sequences), any floating dtype; None means
            zeros. With state_v_first=True it and the final state are [N, H, V, K].
        output_final_state: whether to return the state after the last step, float32 (float64 for float64
            inputs).
        cu_seqlens: [N + 1] int32 or int64, offsets of sequences packed into a batch of 1; starts at 0, ends at
            T, never falls; a sequence may be empty. On a GPU, where no value can be read back, wrong ones count as
            their running maximum from 0 to T. cu_seqlens_cpu: the same values on the host; results do not depend on it.
        chunk_size: steps in a chunk, a power of two from 16 to 256; None means 64. It changes the speed alone.
        reverse: run time backwards; the final state is the one after step 0.
        mode: "auto", or one of "chunk", "fused_chunk", "fused_recurrent", "parallel". A named form is used or refused.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.

    Raises:
        ValueError: if mode is no form.
        NotImplementedError: if the named form cannot serve the call, with its reasons.
    """
    o, final_state = torch.ops.fla.simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, cu_seqlens_cpu,
        steps_or_default(chunk_size), reverse, mode,
    )  # fmt: skip
    return o, final_state
