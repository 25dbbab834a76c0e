"""What the attn operators accept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_ops import validation as valid


def inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    window_size: Any = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    sink_bias: Tensor | None = None,
) -> None:
    """Raise ValueError or TypeError unless the arguments describe one parallel call; sizes may be symbolic."""
    valid.rank("q", q, "[B, T, HQ, K]")
    valid.rank("k", k, "[B, T, H, K]")
    batch, time = q.shape[0], q.shape[1]
    _shared(q, k, v, g, window_size, sink_bias, (batch, time), "[B, T, H, K]", "[B, T, H, V]", "[B, T, HQ]")
    if cu_seqlens is not None:
        valid.cu_seqlens(cu_seqlens, batch)
    if chunk_indices is not None:
        torch._check_value(cu_seqlens is not None, lambda: "chunk_indices was given without cu_seqlens")
        valid.rank("chunk_indices", chunk_indices, "[chunks, 2]")
        valid.shape("chunk_indices", chunk_indices, "[chunks, 2]", (chunk_indices.shape[0], 2))
        torch._check_type(
            chunk_indices.dtype in (torch.int32, torch.int64),
            lambda: f"chunk_indices must be int32 or int64, got {chunk_indices.dtype}",
        )
    valid.same_device(q, k=k, v=v, g=g, sink_bias=sink_bias, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    sink_bias: Tensor | None = None,
) -> None:
    """`inputs` for real sizes: one plain comparison when the common call is right, the full checks otherwise."""
    sizes = q.shape
    if (
        len(sizes) == 4
        and k.shape == sizes
        and v.dim() == 4
        and v.shape[:3] == sizes[:3]
        and 0 not in sizes[2:]
        and v.shape[3] > 0
        and q.dtype == k.dtype == v.dtype
        and q.dtype in valid.FLOATS
        and q.device == k.device == v.device
        and (g is None or (g.shape == sizes[:3] and g.dtype in valid.FLOATS and g.device == q.device))
        and cu_seqlens is chunk_indices is sink_bias is None
        and window_size is None
    ):
        return
    inputs(q, k, v, g, window_size, cu_seqlens, chunk_indices, sink_bias)


def decoding(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor,
    sink_bias: Tensor | None = None,
    window_size: Any = None,
) -> None:
    """The arguments of one decode step against a packed cache; sizes may be symbolic."""
    valid.rank("q", q, "[1, N, HQ, K]")
    valid.rank("k", k, "[1, T, H, K]")
    valid.cu_seqlens(cu_seqlens, k.shape[0])
    valid.shape("q", q, "[1, N, HQ, K]", (1, cu_seqlens.shape[0] - 1, q.shape[2], q.shape[3]))
    _shared(q, k, v, g, window_size, sink_bias, (1, k.shape[1]), "[1, T, H, K]", "[1, T, H, V]", "[1, T, HQ]")
    valid.same_device(q, k=k, v=v, g=g, sink_bias=sink_bias, cu_seqlens=cu_seqlens)


def _shared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    window_size: Any,
    sink_bias: Tensor | None,
    steps: tuple[Any, Any],
    *letters: str,
) -> None:
    """k, v and g have these steps, and heads and widths that fit q."""
    valid.rank("v", v, letters[1])
    query_heads, key_width = q.shape[2], q.shape[3]
    heads, value_width = k.shape[2], v.shape[3]
    valid.positive("k", heads, "H")
    valid.positive("q", query_heads, "HQ")
    valid.positive("q", key_width, "K")
    valid.positive("v", value_width, "V")
    valid.shape("k", k, letters[0], (*steps, heads, key_width))
    valid.shape("v", v, letters[1], (*steps, heads, value_width))
    valid.multiple("q", query_heads, "k and v", heads)
    valid.same_dtype(q=q, k=k, v=v)
    if g is not None:
        valid.shape("g", g, letters[2], (*steps, query_heads))
    if sink_bias is not None:
        valid.shape("sink_bias", sink_bias, "[HQ]", (query_heads,))
    valid.floating(g=g, sink_bias=sink_bias)
    if window_size is not None:
        torch._check_value(window_size >= 1, lambda: f"window_size must be at least 1, got {window_size}")
