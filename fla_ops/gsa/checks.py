"""What the gsa operators accept."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops import validation as valid


def inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None,
    initial_k: Tensor | None,
    initial_v: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    chunk_size: int = 64,
    checkpoint_level: int = 2,
) -> None:
    """Raise ValueError or TypeError unless the arguments describe one call; sizes may be symbolic."""
    valid.rank("q", q, "[B, T, HQ, K]")
    valid.rank("v", v, "[B, T, H, V]")
    valid.rank("s", s, "[B, T, H, M]")
    batch, time, query_heads, key_width = q.shape
    heads, value_width, slots = v.shape[2], v.shape[3], s.shape[3]
    _widths(query_heads, heads, key_width, value_width, slots)
    valid.shape("k", k, "[B, T, H, K]", (batch, time, heads, key_width))
    valid.shape("v", v, "[B, T, H, V]", (batch, time, heads, value_width))
    valid.shape("s", s, "[B, T, H, M]", (batch, time, heads, slots))
    if g is not None:
        valid.shape("g", g, "[B, T, H, M]", (batch, time, heads, slots))
    valid.same_dtype(q=q, k=k, v=v)
    if cu_seqlens is not None:
        valid.cu_seqlens(cu_seqlens, batch, cu_seqlens_cpu)
    torch._check_value(
        cu_seqlens is not None or cu_seqlens_cpu is None, lambda: "cu_seqlens_cpu was given without cu_seqlens"
    )
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_k is not None:
        sizes = (sequences, heads, key_width, slots)
        valid.shape("initial_k", initial_k, "[N, H, K, M] (initial_state[0])", sizes)
    if initial_v is not None:
        sizes = (sequences, heads, slots, value_width)
        valid.shape("initial_v", initial_v, "[N, H, M, V] (initial_state[1])", sizes)
    valid.floating(s=s, g=g, initial_k=initial_k, initial_v=initial_v)
    valid.same_device(q, k=k, v=v, s=s, g=g, initial_k=initial_k, initial_v=initial_v, cu_seqlens=cu_seqlens)
    valid.chunk_size(chunk_size)
    torch._check_value(
        checkpoint_level in (0, 1, 2), lambda: f"checkpoint_level must be 0, 1 or 2, got {checkpoint_level}"
    )


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None,
    initial_k: Tensor | None,
    initial_v: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    chunk_size: int = 64,
    checkpoint_level: int = 2,
) -> None:
    """`inputs` for real sizes: one plain comparison when the common call is right, the full checks otherwise."""
    sizes = v.shape
    if (
        len(sizes) == 4
        and q.dim() == k.dim() == s.dim() == 4
        and k.shape[:3] == s.shape[:3] == sizes[:3]
        and (g is None or (g.shape == s.shape and g.dtype in valid.FLOATS and g.device == q.device))
        and q.shape[:2] == sizes[:2]
        and q.shape[3] == k.shape[3]
        and 0 not in (*q.shape[2:], *sizes[2:], s.shape[3])
        and q.shape[2] % sizes[2] == 0
        and q.dtype == k.dtype == v.dtype
        and q.dtype in valid.FLOATS
        and s.dtype in valid.FLOATS
        and q.device == k.device == v.device == s.device
        and initial_k is initial_v is cu_seqlens is cu_seqlens_cpu is None
        and chunk_size in valid.CHUNK_SIZES
        and checkpoint_level in (0, 1, 2)
    ):
        return
    inputs(q, k, v, s, g, initial_k, initial_v, cu_seqlens, cu_seqlens_cpu, chunk_size, checkpoint_level)


def step(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, state_k: Tensor, state_v: Tensor, slots: Tensor | None
) -> None:
    """The arguments of one decode step; sizes may be symbolic."""
    valid.rank("q", q, "[N, HQ, K]")
    valid.rank("v", v, "[N, H, V]")
    valid.rank("s", s, "[N, H, M]")
    valid.rank("state_k", state_k, "[P, H, K, M]")
    sequences, query_heads, key_width = q.shape
    heads, value_width, width = v.shape[1], v.shape[2], s.shape[2]
    _widths(query_heads, heads, key_width, value_width, width)
    valid.shape("k", k, "[N, H, K]", (sequences, heads, key_width))
    valid.shape("v", v, "[N, H, V]", (sequences, heads, value_width))
    valid.shape("s", s, "[N, H, M]", (sequences, heads, width))
    valid.shape("g", g, "[N, H, M]", (sequences, heads, width))
    valid.same_dtype(q=q, k=k, v=v)
    valid.floating(s=s, g=g)
    rows, letters = state_k.shape[0], ("[P, H, K, M]", "[P, H, M, V]")
    if slots is None:
        rows, letters = sequences, ("[N, H, K, M] (without slots)", "[N, H, M, V] (without slots)")
    else:
        valid.shape("slots", slots, "[N]", (sequences,))
        torch._check_type(
            slots.dtype in (torch.int32, torch.int64), lambda: f"slots must be int32 or int64, got {slots.dtype}"
        )
    valid.shape("state_k", state_k, letters[0], (rows, heads, key_width, width))
    valid.shape("state_v", state_v, letters[1], (rows, heads, width, value_width))
    allowed = valid.FLOATS if q.dtype is torch.float64 else valid.FLOATS[1:]
    for name, state in (("state_k", state_k), ("state_v", state_v)):
        torch._check_type(
            state.dtype in allowed,
            lambda name=name, state=state: f"{name} must be float32, bfloat16 or float16, got {state.dtype}",
        )
    valid.same_device(q, k=k, v=v, s=s, g=g, state_k=state_k, state_v=state_v, slots=slots)


def launch_step(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, state_k: Tensor, state_v: Tensor, slots: Tensor | None
) -> None:
    """`step` for real sizes: one plain comparison when the common call is right, the full checks otherwise."""
    heads, width = v.shape[:2], s.shape[-1]
    if (
        q.dim() == k.dim() == v.dim() == s.dim() == 3
        and k.shape[:2] == heads
        and s.shape == g.shape
        and s.shape[:2] == heads
        and q.shape[0] == heads[0]
        and q.shape[2] == k.shape[2]
        and 0 not in (*q.shape[1:], *v.shape[1:], width)
        and q.shape[1] % heads[1] == 0
        and state_k.shape[1:] == (heads[1], k.shape[2], width)
        and state_v.shape[1:] == (heads[1], width, v.shape[2])
        and q.dtype == k.dtype == v.dtype
        and all(x.dtype in valid.FLOATS for x in (q, s, g))
        and state_k.dtype in valid.FLOATS[1:]
        and state_v.dtype in valid.FLOATS[1:]
        and q.device == k.device == v.device == s.device == g.device == state_k.device == state_v.device
        and state_k.shape[0] == state_v.shape[0]
        and (
            state_k.shape[0] == heads[0]
            if slots is None
            else slots.shape == heads[:1] and slots.dtype in (torch.int32, torch.int64) and slots.device == q.device
        )
    ):
        return
    step(q, k, v, s, g, state_k, state_v, slots)


def _widths(query_heads: int, heads: int, key_width: int, value_width: int, slots: int) -> None:
    valid.positive("q", query_heads, "HQ")
    valid.positive("q", key_width, "K")
    valid.positive("v", heads, "H")
    valid.positive("v", value_width, "V")
    valid.positive("s", slots, "M")
    valid.multiple("q", query_heads, "k, v, s and g", heads)


def chunk_steps(q: Tensor, chunk_size: int) -> int:
    """Steps between two chunk states: a larger chunk is cut, so that a chunk of a kernel fits its registers."""
    return min(chunk_size, 64 if q.dtype in (torch.bfloat16, torch.float16) else 32)


def chunk_rows(q: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> int:
    """How many chunk states a call has; for packed sequences, how many it may have at most."""
    steps = chunk_steps(q, chunk_size)
    batch, time = q.shape[:2]
    if cu_seqlens is None:
        return batch * ((time + steps - 1) // steps)
    return (time + (cu_seqlens.shape[0] - 1) * (steps - 1)) // steps


def mask(g: Tensor | None, output_mask: list[bool]) -> list[bool]:
    """Which gradients (of q, k, v, s, g, ...) to compute: without g, that of s needs those of w and g."""
    return output_mask if g is not None else [*output_mask[:4], output_mask[3], *output_mask[5:]]
