"""What ssd and its decode step accept."""

from __future__ import annotations

import torch

from fla_ops import validation as valid

from .call import Call, Step

GROUPED = ("x", "H", "B and C", "HK")  # each group of B and C serves H // HK heads


def inputs(c: Call) -> None:
    """Raise ValueError or TypeError unless the arguments describe one call; sizes may be symbolic."""
    valid.axes(c, grouped=GROUPED)
    valid.same_dtype(x=c.x, B=c.B, C=c.C)
    valid.floating(dt=c.dt, A=c.A, D=c.D, z=c.z, dt_bias=c.dt_bias, initial_state=c.initial_state)
    valid.exclusive(seq_idx=c.seq_idx, cu_seqlens=c.cu_seqlens)
    if c.seq_idx is not None:
        dtype = c.seq_idx.dtype
        torch._check_type(dtype in (torch.int32, torch.int64), lambda: f"seq_idx must be int32 or int64, got {dtype}")
    valid.same_device(c)
    valid.chunk_size(c.chunk_size)


def step(c: Step) -> None:
    """The arguments of one decode step; sizes may be symbolic."""
    valid.axes(c, grouped=GROUPED)
    valid.same_dtype(x=c.x, B=c.B, C=c.C)
    valid.floating(dt=c.dt, A=c.A, D=c.D, z=c.z, dt_bias=c.dt_bias)
    valid.pools(c, "state")
    valid.same_device(c)


eager = valid.once(inputs)
eager_step = valid.once(step, pools=("state",))
