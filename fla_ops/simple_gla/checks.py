"""What the simple_gla operators accept."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops import validation as valid


def inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    initial_state: Tensor | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = 64,
) -> None:
    """Raise ValueError or TypeError unless the arguments describe one call; sizes may be symbolic."""
    valid.rank("q", q, "[B, T, HK, K]")
    valid.rank("v", v, "[B, T, H, V]")
    batch, time, key_heads, key_width = q.shape
    heads, value_width = v.shape[2], v.shape[3]
    valid.positive("q", key_heads, "HK")
    valid.positive("q", key_width, "K")
    valid.positive("v", heads, "H")
    valid.positive("v", value_width, "V")
    valid.shape("k", k, "[B, T, HK, K]", (batch, time, key_heads, key_width))
    valid.shape("v", v, "[B, T, H, V]", (batch, time, heads, value_width))
    valid.multiple("v", heads, "q and k", key_heads)
    valid.same_dtype(q=q, k=k, v=v)
    valid.exclusive(g=g, g_gamma=g_gamma)
    if g is not None:
        valid.shape("g", g, "[B, T, H]", (batch, time, heads))
    if g_gamma is not None:
        valid.shape("g_gamma", g_gamma, "[H]", (heads,))
    if cu_seqlens is not None:
        valid.cu_seqlens(cu_seqlens, batch, cu_seqlens_cpu)
    torch._check_value(
        cu_seqlens is not None or cu_seqlens_cpu is None, lambda: "cu_seqlens_cpu was given without cu_seqlens"
    )
    if initial_state is not None:
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if state_v_first:
            letters, widths = "[N, H, V, K] (state_v_first=True)", (value_width, key_width)
        else:
            letters, widths = "[N, H, K, V]", (key_width, value_width)
        valid.shape("initial_state", initial_state, letters, (sequences, heads, *widths))
    valid.floating(g=g, g_gamma=g_gamma, initial_state=initial_state)
    valid.same_device(q, k=k, v=v, g=g, g_gamma=g_gamma, initial_state=initial_state, cu_seqlens=cu_seqlens)
    valid.chunk_size(chunk_size)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    initial_state: Tensor | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = 64,
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
        and (
            g is None or (g_gamma is None and g.shape == sizes[:3] and g.dtype in valid.FLOATS and g.device == q.device)
        )
        and g_gamma is initial_state is cu_seqlens is cu_seqlens_cpu is None
        and chunk_size in valid.CHUNK_SIZES
    ):
        return
    inputs(q, k, v, g, g_gamma, initial_state, state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    slots: Tensor | None,
) -> None:
    """The arguments of one decode step; sizes may be symbolic."""
    valid.rank("q", q, "[N, HK, K]")
    valid.rank("v", v, "[N, H, V]")
    valid.rank("state", state, "[P, H, K, V]")
    sequences, key_heads, key_width = q.shape
    heads, value_width = v.shape[1], v.shape[2]
    valid.positive("q", key_heads, "HK")
    valid.positive("q", key_width, "K")
    valid.positive("v", heads, "H")
    valid.positive("v", value_width, "V")
    valid.shape("k", k, "[N, HK, K]", (sequences, key_heads, key_width))
    valid.shape("v", v, "[N, H, V]", (sequences, heads, value_width))
    valid.multiple("v", heads, "q and k", key_heads)
    valid.same_dtype(q=q, k=k, v=v)
    valid.exclusive(g=g, g_gamma=g_gamma)
    if g is not None:
        valid.shape("g", g, "[N, H]", (sequences, heads))
    if g_gamma is not None:
        valid.shape("g_gamma", g_gamma, "[H]", (heads,))
    valid.floating(g=g, g_gamma=g_gamma)
    if slots is None:
        valid.shape("state", state, "[N, H, K, V] (without slots)", (sequences, heads, key_width, value_width))
    else:
        valid.shape("state", state, "[P, H, K, V]", (state.shape[0], heads, key_width, value_width))
        valid.shape("slots", slots, "[N]", (sequences,))
        torch._check_type(
            slots.dtype in (torch.int32, torch.int64), lambda: f"slots must be int32 or int64, got {slots.dtype}"
        )
    torch._check_type(
        state.dtype in (valid.FLOATS if q.dtype is torch.float64 else valid.FLOATS[1:]),
        lambda: f"state must be float32, bfloat16 or float16, got {state.dtype}",
    )
    valid.same_device(q, k=k, v=v, state=state, g=g, g_gamma=g_gamma, slots=slots)


def launch_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    slots: Tensor | None,
) -> None:
    """`step` for real sizes: one plain comparison when the common call is right, the full checks otherwise."""
    sizes, heads = q.shape, v.shape[:2]
    if (
        len(sizes) == v.dim() == 3
        and k.shape == sizes
        and heads == sizes[:2]
        and state.shape[1:] == (*sizes[1:], v.shape[2])
        and 0 not in (*sizes[1:], v.shape[2])
        and q.dtype == k.dtype == v.dtype
        and q.dtype in valid.FLOATS
        and state.dtype in valid.FLOATS[1:]
        and q.device == k.device == v.device == state.device
        and (g is None or (g_gamma is None and g.shape == heads and g.dtype in valid.FLOATS and g.device == q.device))
        and (
            g_gamma is None
            or (g_gamma.shape == heads[1:] and g_gamma.dtype in valid.FLOATS and g_gamma.device == q.device)
        )
        and (
            state.shape[0] == sizes[0]
            if slots is None
            else slots.shape == sizes[:1] and slots.dtype in (torch.int32, torch.int64) and slots.device == q.device
        )
    ):
        return
    step(q, k, v, state, g, g_gamma, slots)
