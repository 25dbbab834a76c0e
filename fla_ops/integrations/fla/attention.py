"""What fla's softmax attention calls of the flash-attn package, where that is missing or cannot run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import fla_ops
from fla_ops.integrations.fla.refusing import refuse
from fla_ops.integrations.fla.replacing import fills
from fla_ops.integrations.softmax_attention import last_rows


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1), **kwargs: Any
) -> Tensor:
    """q [B, S, HQ, K], k and v [B, T, H, K]: the last S of T steps."""
    refuse("flash_attn_func", **{"attention that is not causal": not causal}, **kwargs)
    window = _window(window_size)
    if q.shape[1] == k.shape[1]:
        return fla_ops.parallel_attn(q, k, v, window_size=window)
    return last_rows(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, window, None)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    **kwargs: Any,
) -> Tensor:
    """q [S, HQ, K], k and v [T, H, K]: packed sequences, whole or the newest step of each."""
    refuse("flash_attn_varlen_func", **{"attention that is not causal": not causal}, **kwargs)
    window = _window(window_size)
    q, k, v = q[None], k[None], v[None]
    if cu_seqlens_q is cu_seqlens_k:
        return fla_ops.parallel_attn(q, k, v, window_size=window, cu_seqlens=cu_seqlens_k)[0]
    if max_seqlen_q != 1:
        raise NotImplementedError(
            "fla_ops serves flash_attn_varlen_func for whole sequences, or for one query of each; got other "
            f"cu_seqlens_q than cu_seqlens_k and max_seqlen_q {max_seqlen_q}"
        )
    return fla_ops.attn_decoding_one_step(q, k, v, cu_seqlens=cu_seqlens_k, window_size=window)[0]


def _window(window_size: tuple[int, int]) -> int | None:
    """How many keys a query sees: those before it, and its own."""
    return None if window_size[0] < 0 else window_size[0] + 1


def _unless_installed(ours: Callable[..., Tensor], theirs: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """flash-attn's kernel where there is one, on a GPU; ours everywhere else."""
    if theirs is None:
        return ours
    return lambda q, *args, **kwargs: (theirs if q.is_cuda else ours)(q, *args, **kwargs)


@fills("fla.layers.attn:flash_attn_func")
def _flash_attn_func(theirs: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    return _unless_installed(flash_attn_func, theirs)


@fills("fla.layers.attn:flash_attn_varlen_func")
def _flash_attn_varlen_func(theirs: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    return _unless_installed(flash_attn_varlen_func, theirs)
