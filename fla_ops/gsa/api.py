"""Public functions of gsa: gated slot attention (arXiv 2409.07146), and ABC (arXiv 2110.02488) where g is not given.

    A_t = A_{t-1} diag(exp g_t) + k_t s_t^T,    x_t = scale * A_t^T q_t,    p_t = softmax(x_t)
    C_t = diag(exp g_t) C_{t-1} + s_t v_t^T,    o_t = C_t^T p_t

M memory slots hold a key and a value each; every step writes to slot m with weight s_tm and lets it fade by exp(g_tm),
and reads the slots by softmax attention. The chunkwise form is derived in this folder's README.md.

`help(fla_ops.gsa)` describes the arguments that the functions share. Every function raises ValueError for a wrong
shape, device or value, TypeError for a wrong dtype. Gradients flow to q, k, v, s, g and both states; forward-mode AD
and double backward raise NotImplementedError.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fla_ops.dispatch import dispatcher
from fla_ops.public import public, steps_or_default

from .forms import FAMILY

Pair = tuple[Tensor, Tensor]
Mode = Literal["auto", "chunk", "fused_recurrent"]


def _states(initial_state: Any) -> tuple[Tensor | None, Tensor | None]:
    """The operators' initial_k and initial_v."""
    if initial_state is None:
        return None, None
    wanted = "initial_state must be a pair ([N, H, K, M], [N, H, M, V]), got "
    if not isinstance(initial_state, tuple | list):
        raise TypeError(wanted + type(initial_state).__name__)
    if len(initial_state) != 2:
        raise ValueError(f"{wanted}{len(initial_state)} states")
    initial_k, initial_v = initial_state
    if initial_k is None or initial_v is None:
        raise ValueError(f"{wanted}None for {'the keys' if initial_k is None else 'the values'}; give zeros instead")
    return initial_k, initial_v


def _arguments(initial_state: Any, **others: Any) -> dict[str, Any]:
    """The operator's arguments from those of `gsa`."""
    initial_k, initial_v = _states(initial_state)
    return others | {"initial_k": initial_k, "initial_v": initial_v}


@overload
def chunk_gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, scale: float | None = None,
    initial_state: Pair | None = None, output_final_state: Literal[False] = False, checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def chunk_gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, scale: float | None = None,
    initial_state: Pair | None = None, *, output_final_state: Literal[True], checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...  # fmt: skip
@overload
def chunk_gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, scale: float | None = None,
    initial_state: Pair | None = None, output_final_state: bool = False, checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]: ...  # fmt: skip
@public
def chunk_gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, scale: float | None = None,
    initial_state: Pair | None = None, output_final_state: bool = False, checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
) -> tuple[Tensor, Pair | None]:  # fmt: skip
    """Chunkwise form: a state pass over the chunks, then all chunks in parallel. For training and prefill.

    Args:
        q, k, v, s, g, scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu: as `help(fla_ops.gsa)`
            says.
        checkpoint_level: what is kept for the gradient beside the inputs. 0: the argument of the softmax,
            [B, T, HQ, M], and the states before each chunk; 1: only the former; 2: nothing. The rest is computed again;
            the result does not depend on it.
        chunk_size: steps in a chunk, a power of two from 16 to 256; chunks of more than 64 steps (of more than 32 for
            float32 and float64) are cut. A matter of speed, not of the result.

    Returns:
        o [B, T, HQ, V] in v's dtype, and the final states or None.
    """
    initial_k, initial_v = _states(initial_state)
    o, final_k, final_v = torch.ops.fla.chunk_gsa(
        q, k, v, s, g, scale, initial_k, initial_v, output_final_state, checkpoint_level, cu_seqlens, cu_seqlens_cpu,
        steps_or_default(chunk_size),
    )  # fmt: skip
    return o, (final_k, final_v) if output_final_state else None


@overload
def fused_recurrent_gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, scale: float | None = None,
    initial_state: Pair | None = None, output_final_state: Literal[False] = False, reverse: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def fused_recurrent_gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, scale: float | None = None,
    initial_state: Pair | None = None, *, output_final_state: Literal[True], reverse: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...  # fmt: skip
@overload
def fused_recurrent_gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, scale: float | None = None,
    initial_state: Pair | None = None, output_final_state: bool = False, reverse: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]: ...  # fmt: skip
@public
def fused_recurrent_gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, scale: float | None = None,
    initial_state: Pair | None = None, output_final_state: bool = False, reverse: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Pair | None]:  # fmt: skip
    """The recurrence, step by step. For short sequences and decoding.

    Args:
        q, k, v, s, g, scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu: as `help(fla_ops.gsa)`
            says.
        reverse: run time backwards, from A_{t+1} and C_{t+1} to A_t and C_t; the final states are those after step 0.
            Without g, the running logsumexp runs backwards too.

    Returns:
        o [B, T, HQ, V] in v's dtype, and the final states or None.
    """
    initial_k, initial_v = _states(initial_state)
    o, final_k, final_v = torch.ops.fla.fused_recurrent_gsa(
        q, k, v, s, g, scale, initial_k, initial_v, output_final_state, reverse, cu_seqlens, cu_seqlens_cpu
    )
    return o, (final_k, final_v) if output_final_state else None


@public
def gsa_step_(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, state_k: Tensor, state_v: Tensor,
    scale: float | None = None, slots: Tensor | None = None, state_v_first: bool = False,
) -> Tensor:  # fmt: skip
    """One step for N sequences whose states live in two pools, updated in place. For decoding; it has no gradient.

    Args:
        q: [N, HQ, K]. k: [N, H, K]. v: [N, H, V]. s, g: [N, H, M]. scale: as `help(fla_ops.gsa)` says.
        state_k: [P, H, K, M]. state_v: [P, H, M, V]. float32, bfloat16 or float16; the arithmetic is float32. The pools
            share no memory with each other, and no element lies in a pool twice. With state_v_first=True each is
            stored with what is read out of it first, [P, H, M, K] and [P, H, V, M]: the slots are the values of the
            first recurrence.
        slots: [N] int32 or int64, the cache row of each sequence in both pools (not its M memory slots); all different.
            -1 is padding: nothing is read or written for it and its output is zero. None means row n for sequence n,
            and P = N. A row outside the pools is a ValueError on a CPU; a GPU, where no value can be read back, leaves
            the pools alone and fills that output row with NaN.

    Returns:
        o [N, HQ, V] in v's dtype.

    Raises:
        NotImplementedError: if a gradient is asked for.
    """
    o: Tensor = torch.ops.fla.gsa_step_(q, k, v, s, g, state_k, state_v, scale, slots, state_v_first)
    return o


@public
def gsa_prefill_(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, state_k: Tensor, state_v: Tensor,
    scale: float | None = None, slots: Tensor | None = None, fresh: Tensor | None = None,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = 64,
) -> Tensor:  # fmt: skip
    """Sequences of any lengths whose states live in two pools: each starts from its rows, which then hold its final
    states. For prompts, pieces of prompts and single tokens in one call; it has no gradient.

    Equal, bit for bit, to chunk_gsa from the rows' states, with what it returns put back into the rows; so it is made.

    Args:
        q, k, v, s, g, scale, cu_seqlens, cu_seqlens_cpu: as `help(fla_ops.gsa)` says.
        state_k, state_v, state_v_first, slots: as in gsa_step_; a padded sequence's output is zero.
        fresh: [N] bool, which sequences start from zeros, whatever their rows hold (NaN too). None means that none
            does. A sequence without steps leaves its rows alone, or zeros them if it is fresh.
        chunk_size: as in chunk_gsa.

    Returns:
        o [B, T, HQ, V] in v's dtype.

    Raises:
        NotImplementedError: if a gradient is asked for.
    """
    o: Tensor = torch.ops.fla.gsa_prefill_(
        q, k, v, s, g, state_k, state_v, scale, slots, fresh, state_v_first, cu_seqlens, cu_seqlens_cpu,
        steps_or_default(chunk_size),
    )  # fmt: skip
    return o


@public
def gsa_advance_(
    k: Tensor, v: Tensor, s: Tensor, g: Tensor, state_k: Tensor, state_v: Tensor, accepted: Tensor,
    slots: Tensor | None = None, state_v_first: bool = False,
) -> None:  # fmt: skip
    """The first few of T steps for N sequences whose states live in two pools, updated in place, without outputs: what
    is kept of drafted tokens. It has no gradient.

    Equal to as many calls of gsa_step_. Half-precision pools are rounded once, at the end.

    Args:
        k: [N, T, H, K]. v: [N, T, H, V]. s, g: [N, T, H, M]. As `help(fla_ops.gsa)` says.
        state_k, state_v, state_v_first, slots: as in gsa_step_.
        accepted: [N] int32 or int64, how many steps each sequence takes, from 0 to T. Another number is a ValueError on
            a CPU; on a GPU, where no value can be read back, one below 0 counts as 0, and one above T as T.

    Raises:
        NotImplementedError: if a gradient is asked for.
    """
    torch.ops.fla.gsa_advance_(k, v, s, g, state_k, state_v, accepted, slots, state_v_first)


@public
def gsa_states(
    k: Tensor, v: Tensor, s: Tensor, g: Tensor, initial_state: Pair | None = None, every: int = 64,
    q: Tensor | None = None, scale: float | None = None, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64, at: Tensor | None = None,
) -> tuple[Tensor | None, Pair, Pair]:  # fmt: skip
    """Both states of each sequence after every few steps, or after given numbers of them, for caches of prefixes; the
    outputs too where q is given. It has no gradient.

    After a multiple of chunk_size steps, the states are equal, bit for bit, to the final states of chunk_gsa over so
    many; and a run that starts from there, with the same chunk_size, equals one that did not stop, bit for bit. After
    another number of steps, both are equal up to rounding. Outputs are computed even where q is not given.

    Args:
        k, v, s, g, initial_state, scale, cu_seqlens, cu_seqlens_cpu: as `help(fla_ops.gsa)` says.
        every: steps from one state that is kept to the next, counted from each sequence's start; a multiple of
            chunk_size.
        q: [B, T, HQ, K]; None means that no outputs are wanted.
        chunk_size: as in chunk_gsa.
        at: [N, A] int32 or int64, given instead of `every`: states a of sequence n are those after its first at[n, a]
            steps, in any order, 0 for the initial ones. Where the sequence has not so many, and for -1, they are zeros.

    Returns:
        o [B, T, HQ, V] in v's dtype, or None without q.
        states [C, H, K, M] and [C, H, M, V] in float32 (float64 for float64 inputs), C = B * (T // every). Those of one
            sequence follow those of the one before; a sequence of L steps has L // every. Packed sequences may have
            fewer in all than C: rows past the last are zeros. With `at` they are [N, A, H, K, M] and [N, A, H, M, V].
        final_state [N, H, K, M] and [N, H, M, V], likewise.

    Raises:
        NotImplementedError: if a gradient is asked for.
    """
    o, states_k, states_v, final_k, final_v = torch.ops.fla.gsa_states(
        k, v, s, g, *_states(initial_state), every, q, scale, cu_seqlens, cu_seqlens_cpu, steps_or_default(chunk_size),
        at,
    )  # fmt: skip
    return o, (states_k, states_v), (final_k, final_v)


@overload
def gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, scale: float | None = None,
    initial_state: Pair | None = None, output_final_state: Literal[False] = False, checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
    reverse: bool = False, mode: Mode = "auto",
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, scale: float | None = None,
    initial_state: Pair | None = None, *, output_final_state: Literal[True], checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
    reverse: bool = False, mode: Mode = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...  # fmt: skip
@overload
def gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, scale: float | None = None,
    initial_state: Pair | None = None, output_final_state: bool = False, checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
    reverse: bool = False, mode: Mode = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]: ...  # fmt: skip
@dispatcher(FAMILY, arguments=_arguments)
@public
def gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, scale: float | None = None,
    initial_state: Pair | None = None, output_final_state: bool = False, checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_size: int | None = 64,
    reverse: bool = False, mode: Mode = "auto",
) -> tuple[Tensor, Pair | None]:  # fmt: skip
    """The form that suits the call: `fla_ops.explain(fla_ops.gsa, ...)` says which, and why not the others.

    Args:
        q: [B, T, HQ, K]. k: [B, T, H, K]. v: [B, T, H, V]. HQ is a multiple of H: each key/value head serves HQ
            // H query heads. One floating dtype for all three.
        s: [B, T, H, M], what each memory slot takes in; any floating dtype.
        g: [B, T, H, M], the natural logarithm of the decay of each slot, usually <= 0 (-inf empties the slot);
            any floating dtype. None is vanilla ABC: with z the running logsumexp of s over time, s becomes
            exp(s - z) and g_t = z_{t-1} - z_t, 0 at a sequence's first step.
        scale: factor on q; None means K ** -0.5.
        initial_state: the pair A [N, H, K, M] and C [N, H, M, V] (N = B, or the number of packed sequences),
            any floating dtype; None means zeros in both.
        output_final_state: whether to return that pair after the last step, float32 (float64 for float64
            inputs).
        cu_seqlens: [N + 1] int32 or int64, offsets of sequences packed into a batch of 1; starts at 0, ends at
            T, never falls; a sequence may be empty. On a GPU, where no value can be read back, wrong ones count as
            their running maximum from 0 to T. cu_seqlens_cpu: the same values on the host; results do not depend on it.
        chunk_size: steps in a chunk, a power of two from 16 to 256; None means 64. It changes the speed alone.
        reverse: run time backwards; the final state is the one after step 0.
        mode: "auto", "chunk" or "fused_recurrent". A named form is used or refused.

    Returns:
        o [B, T, HQ, V] in v's dtype, and the final states or None.

    Raises:
        ValueError: if mode is no form.
        NotImplementedError: if the named form cannot serve the call, with its reasons.
    """
    initial_k, initial_v = _states(initial_state)
    o, final_k, final_v = torch.ops.fla.gsa(
        q, k, v, s, g, scale, initial_k, initial_v, output_final_state, checkpoint_level, cu_seqlens, cu_seqlens_cpu,
        steps_or_default(chunk_size), reverse, mode,
    )  # fmt: skip
    return o, (final_k, final_v) if output_final_state else None
