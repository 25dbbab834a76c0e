"""What the operators of linear_attn accept beyond what simple_gla's operators check."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops import validation as valid


def inputs(
    q: Tensor,
    k: Tensor,
    o: Tensor,
    initial_z: Tensor | None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> None:
    """Raise ValueError or TypeError unless the arguments describe one normalisation; sizes may be symbolic."""
    valid.rank("q", q, "[B, T, HK, K]")
    valid.rank("o", o, "[B, T, H, V]")
    batch, time, key_heads, key_width = q.shape
    heads, value_width = o.shape[2], o.shape[3]
    valid.positive("q", key_heads, "HK")
    valid.positive("q", key_width, "K")
    valid.positive("o", heads, "H")
    valid.positive("o", value_width, "V")
    valid.shape("k", k, "[B, T, HK, K]", (batch, time, key_heads, key_width))
    valid.shape("o", o, "[B, T, H, V]", (batch, time, heads, value_width))
    valid.multiple("o", heads, "q and k", key_heads)
    valid.same_dtype(q=q, k=k, o=o)
    if cu_seqlens is not None:
        valid.cu_seqlens(cu_seqlens, batch, cu_seqlens_cpu)
    torch._check_value(
        cu_seqlens is not None or cu_seqlens_cpu is None, lambda: "cu_seqlens_cpu was given without cu_seqlens"
    )
    if initial_z is not None:
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        valid.shape("initial_z", initial_z, "[N, 1, H, K]", (sequences, 1, heads, key_width))
        valid.floating(initial_z=initial_z)
    valid.same_device(q, k=k, o=o, initial_z=initial_z, cu_seqlens=cu_seqlens)


def launch(
    q: Tensor,
    k: Tensor,
    o: Tensor,
    initial_z: Tensor | None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> None:
    """`inputs` for real sizes: one plain comparison when the common call is right, the full checks otherwise."""
    sizes = q.shape
    if (
        len(sizes) == 4
        and k.shape == sizes
        and o.dim() == 4
        and o.shape[:3] == sizes[:3]
        and 0 not in sizes[2:]
        and o.shape[3] > 0
        and q.dtype == k.dtype == o.dtype
        and q.dtype in valid.FLOATS
        and q.device == k.device == o.device
        and initial_z is cu_seqlens is cu_seqlens_cpu is None
    ):
        return
    inputs(q, k, o, initial_z, cu_seqlens, cu_seqlens_cpu)


def step(q: Tensor, k: Tensor, o: Tensor, z: Tensor, slots: Tensor | None, name: str = "o") -> None:
    """The arguments of one step of the normalisation; `name` is what the caller calls `o`. Sizes may be symbolic."""
    valid.rank("q", q, "[N, HK, K]")
    valid.rank(name, o, "[N, H, V]")
    valid.rank("z", z, "[P, 1, H, K]")
    sequences, key_heads, key_width = q.shape
    heads, value_width = o.shape[1], o.shape[2]
    valid.positive("q", key_heads, "HK")
    valid.positive("q", key_width, "K")
    valid.positive(name, heads, "H")
    valid.positive(name, value_width, "V")
    valid.shape("k", k, "[N, HK, K]", (sequences, key_heads, key_width))
    valid.shape(name, o, "[N, H, V]", (sequences, heads, value_width))
    valid.multiple(name, heads, "q and k", key_heads)
    valid.same_dtype(q=q, k=k, **{name: o})
    if slots is None:
        valid.shape("z", z, "[N, 1, H, K] (without slots)", (sequences, 1, heads, key_width))
    else:
        valid.shape("z", z, "[P, 1, H, K]", (z.shape[0], 1, heads, key_width))
        valid.shape("slots", slots, "[N]", (sequences,))
        torch._check_type(
            slots.dtype in (torch.int32, torch.int64), lambda: f"slots must be int32 or int64, got {slots.dtype}"
        )
    torch._check_type(
        z.dtype in (valid.FLOATS if q.dtype is torch.float64 else valid.FLOATS[1:]),
        lambda: f"z must be float32, bfloat16 or float16, got {z.dtype}",
    )
    valid.same_device(q, k=k, z=z, slots=slots, **{name: o})


def launch_step(q: Tensor, k: Tensor, o: Tensor, z: Tensor, slots: Tensor | None, name: str = "o") -> None:
    """`step`, after one plain comparison where the sizes are plain and the common call is right."""
    sizes = q.shape
    if (
        all(type(size) is int for x in (q, k, o, z) for size in x.shape)
        and len(sizes) == 3
        and k.shape == sizes
        and o.dim() == 3
        and o.shape[:2] == sizes[:2]
        and 0 not in sizes[1:]
        and o.shape[2] > 0
        and z.shape[1:] == (1, *sizes[1:])
        and q.dtype == k.dtype == o.dtype
        and q.dtype in valid.FLOATS
        and z.dtype in valid.FLOATS[1:]
        and q.device == k.device == o.device == z.device
        and (
            z.shape[0] == sizes[0]
            if slots is None
            else slots.shape == sizes[:1] and slots.dtype in (torch.int32, torch.int64) and slots.device == q.device
        )
    ):
        return
    step(q, k, o, z, slots, name)


def pools(state: Tensor, z: Tensor) -> None:
    """Both parts of a state lie in the same row of their pools."""
    valid.rank("state", state, "[P, H, K, V]")
    torch._check_value(
        z.shape[0] == state.shape[0],
        lambda: f"z must have the P = {state.shape[0]} rows of state, got {z.shape[0]}",
    )


def pair(initial_state: Tensor | None, initial_z: Tensor | None, normalize: bool) -> None:
    """A normalised run starts from both parts of a state or from none; any other run has no z."""
    wanted = "(kv [N, H, K, V], z [N, 1, H, K])"
    if normalize and (initial_state is None) != (initial_z is None):
        got = "no initial_z" if initial_z is None else "initial_z alone"
        raise ValueError(f"with normalize=True, initial_state must be a pair {wanted}, got {got}")
    if not normalize and initial_z is not None:
        raise ValueError(f"with normalize=False, initial_state must be kv [N, H, K, V] alone, got a pair {wanted}")
