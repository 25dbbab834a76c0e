"""Public functions of attn: softmax attention with decay, a window and sinks.

    x_ij = scale q_i.k_j + G_i - G_j          for i - window_size < j <= i,  G the running sum of g
    o_i  = sum_j exp(x_ij) v_j / (sum_j exp(x_ij) + exp(sink_bias))

The decay is that of the Forgetting Transformer (arXiv 2503.02130), sinks are those of gpt-oss (arXiv 2508.10925), and
the kernels follow FlashAttention-2 (arXiv 2307.08691). This folder's README.md derives them.

Every function raises ValueError for a wrong shape, device or value, TypeError for a wrong dtype. Forward-mode AD and
double backward raise NotImplementedError. On a GPU, K and V are at most 256, and float64 is refused.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fla_ops.dispatch import dispatcher
from fla_ops.public import public

from .forms import FAMILY


@public
def parallel_attn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None,
    window_size: int | None = None, cu_seqlens: Tensor | None = None, chunk_indices: Tensor | None = None, *,
    sink_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Every row against the keys up to its own, without a T x T matrix. For training and prefill.

    `torch.ops.fla.parallel_attn_forward` also returns the logarithm of each row's denominator, [B, T, HQ], with a
    gradient.

    Args:
        q, k, v: queries [B, T, HQ, K], keys [B, T, H, K] and values [B, T, H, V], of one floating dtype. HQ is a
            multiple of H: each key/value head serves HQ // H query heads, which lie side by side.
        g: [B, T, HQ], the natural logarithm of the decay on entering a step, usually <= 0; any floating dtype. At or
            below -5000 (-inf included) a step forgets all that was before it. None means no decay.
        scale: factor on q . k; None means K ** -0.5.
        window_size: how many keys a row sees, its own included; with 0 it sees none, and its output is zero. None
            means all up to its own.
        cu_seqlens: [N + 1] int32 or int64, offsets of sequences packed into a batch of 1; starts at 0, ends at T,
            never falls; a sequence may be empty. On a GPU, where no value can be read back, wrong ones count as their
            running maximum from 0 to T. None means a batch of B sequences.
        chunk_indices: [chunks, 2], integers, beside cu_seqlens. It is accepted for compatibility, and its values are
            not read, because where the blocks of packed sequences lie is found on the device.
        sink_bias: [HQ], the logarithm of one more term in the denominator; any floating dtype. None means there is
            none.

    Returns:
        o [B, T, HQ, V] in q's dtype. Gradients flow to q, k, v, g and sink_bias.
    """
    o: Tensor = torch.ops.fla.parallel_attn(q, k, v, g, scale, window_size, cu_seqlens, chunk_indices, sink_bias)
    return o


@public
def attn_prefill(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None,
    window_size: int | None = None, cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None, *,
    sink_bias: Tensor | None = None, softcap: float | None = None, gap: int | None = None, decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The newest T rows of parallel_attn against all TK keys, for prefill in chunks; or rows against older keys alone.

    Without `gap` the queries are of the keys' last steps: query T - 1 sits at key TK - 1, and each sees the keys up to
    its own. With `gap` they come after all keys. Attention to keys that are held apart joins by the logarithms:
    `o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2` with `lse = log(exp lse_1 + exp lse_2)`.

    Args:
        q: queries [B, T, HQ, K], of one floating dtype with k and v.
        k, v: keys [B, TK, H, K] and values [B, TK, H, V], the queries' own steps included unless there is a gap. HQ is
            a multiple of H: each key/value head serves HQ // H query heads, which lie side by side.
        g: [B, TK, HQ], the natural logarithm of the decay on entering each step of the keys, usually <= 0; any floating
            dtype. At or below -5000 (-inf included) a step forgets all that was before it. None means no decay.
        scale: factor on q . k; None means K ** -0.5.
        window_size: how many keys a row sees, its own included and those of the gap too; with 0 it sees none. None
            means all up to its own.
        cu_seqlens, cu_seqlens_k: [N + 1] int32 or int64, offsets of sequences packed into a batch of 1, in q and in k,
            v and g; they start at 0, end at T and TK, and never fall; a sequence may be empty in either. On a GPU,
            where no value can be read back, wrong ones count as their running maximum from 0 to T or TK. None means a
            batch of B sequences.
        sink_bias: [HQ], the logarithm of one more term in the denominator; any floating dtype. None means there is
            none.
        softcap: a cap on the scores: softcap * tanh(scale q.k / softcap) takes the place of scale q.k. None means none.
        gap: how many steps lie between the last key of a sequence and its first query. None means that the queries are
            of the keys' last steps.
        decay: [B, T, HQ], with `gap`: the natural logarithm of the decay from the last key of its sequence to each
            query; any floating dtype. None means that none is added to that of g.

    Returns:
        o [B, T, HQ, V] in q's dtype, and lse [B, T, HQ] in float32 (float64 for float64 inputs), the logarithm of each
        row's denominator. A row that sees no key gives zeros, and the sink or -inf. Gradients of both flow to q, k, v,
        g, sink_bias and decay.
    """
    o, lse = torch.ops.fla.attn_prefill(
        q, k, v, g, scale, window_size, cu_seqlens, cu_seqlens_k, sink_bias, softcap, gap, decay
    )
    return o, lse


@public
def attn_decoding_one_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None,
    cu_seqlens: Tensor | None = None, do_gate_scale: bool = False, *, sink_bias: Tensor | None = None,
    window_size: int | None = None,
) -> Tensor:  # fmt: skip
    """One query for each packed sequence, against its cache: the row that parallel_attn would give for the last step.

    Args:
        q: [1, N, HQ, K], the newest query of each of N sequences.
        k, v: [1, T, H, K] and [1, T, H, V], the caches one after the other, in q's dtype. HQ is a multiple of H: each
            key/value head serves HQ // H query heads, which lie side by side.
        g: [1, T, HQ], the natural logarithm of the decay on entering each step of the caches, usually <= 0; any
            floating dtype. None means no decay.
        scale: factor on q . k; None means K ** -0.5.
        cu_seqlens: [N + 1] int32 or int64, required: steps cu_seqlens[n] to cu_seqlens[n + 1] of k, v and g are the
            cache of sequence n, its newest step included.
        do_gate_scale: whether to multiply g by scale first.
        sink_bias: [HQ], the logarithm of one more term in the denominator; any floating dtype. None means there is
            none.
        window_size: how many keys a query sees, the newest ones; no others are read. None means all.

    Returns:
        o [1, N, HQ, V] in q's dtype, zeros for an empty cache.

    Raises:
        NotImplementedError: if a gradient is asked for.
    """
    if cu_seqlens is None:
        raise ValueError(
            "attn_decoding_one_step needs cu_seqlens: the offsets [N + 1] of the caches packed into k and v"
        )
    o: Tensor = torch.ops.fla.attn_decoding_one_step(
        q, k, v, g, scale, cu_seqlens, do_gate_scale, sink_bias, window_size
    )
    return o


@dispatcher(FAMILY)
@public
def attn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None,
    window_size: int | None = None, cu_seqlens: Tensor | None = None, chunk_indices: Tensor | None = None,
    do_gate_scale: bool = False, *, sink_bias: Tensor | None = None,
    mode: Literal["auto", "parallel", "decoding"] = "auto",
) -> Tensor:  # fmt: skip
    """parallel_attn where q and k have the same steps, attn_decoding_one_step where q has one for each sequence.

    `fla_ops.explain(fla_ops.attn, ...)` says which, and why not the other. With G the running sum of g, row i gives

        x_ij = scale q_i.k_j + G_i - G_j          for i - window_size < j <= i
        o_i  = sum_j exp(x_ij) v_j / (sum_j exp(x_ij) + exp(sink_bias))

    Args:
        q, k, v: queries [B, T, HQ, K], keys [B, T, H, K] and values [B, T, H, V], of one floating dtype; in decoding
            queries [1, N, HQ, K], and keys and values of a batch of 1. HQ is a multiple of H: each key/value head
            serves HQ // H query heads, which lie side by side.
        g: [B, T, HQ], the natural logarithm of the decay on entering a step, usually <= 0; any floating dtype. At or
            below -5000 (-inf included) a step forgets all that was before it. None means no decay.
        scale: factor on q . k; None means K ** -0.5.
        window_size: how many keys a row sees, its own included; with 0 it sees none, and its output is zero. None
            means all up to its own.
        cu_seqlens: [N + 1] int32 or int64, offsets of sequences packed into a batch of 1; starts at 0, ends at T,
            never falls; a sequence may be empty. On a GPU, where no value can be read back, wrong ones count as their
            running maximum from 0 to T. None means a batch of B sequences.
        chunk_indices: as for parallel_attn, which does not read its values either.
        do_gate_scale: whether to multiply g by scale first; only in decoding.
        sink_bias: [HQ], the logarithm of one more term in the denominator; any floating dtype. None means there is
            none.
        mode: "auto", "parallel" or "decoding". A named form is used or refused.

    Returns:
        o [B, T, HQ, V] or [1, N, HQ, V] in q's dtype. Gradients flow as through parallel_attn; decoding has none.

    Raises:
        ValueError: if mode is no form.
        NotImplementedError: if the named form cannot serve the call, with its reasons.
    """
    o: Tensor = torch.ops.fla.attn(
        q, k, v, g, scale, window_size, cu_seqlens, chunk_indices, do_gate_scale, sink_bias, mode
    )
    return o
