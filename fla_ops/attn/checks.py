"""What the attn operators accept."""

from __future__ import annotations

import torch

from fla_ops import validation as valid

from .call import Call, Decoding, Prefill

GROUPED = ("q", "HQ", "k and v", "H")  # each key/value head serves HQ // H query heads


def inputs(c: Call) -> valid.Sizes:
    """Raise ValueError or TypeError unless the arguments describe one parallel call; sizes may be symbolic."""
    sizes = _shared(c)
    if (indices := c.chunk_indices) is not None:
        torch._check_value(c.cu_seqlens is not None, lambda: "chunk_indices was given without cu_seqlens")
        torch._check_type(
            indices.dtype in (torch.int32, torch.int64),
            lambda: f"chunk_indices must be int32 or int64, got {indices.dtype}",
        )
    return sizes


def prefill(c: Prefill) -> valid.Sizes:
    """The arguments of one rectangular call; sizes may be symbolic."""
    for given, other in (("cu_seqlens", "cu_seqlens_k"), ("cu_seqlens_k", "cu_seqlens")):
        both = (getattr(c, given) is None) == (getattr(c, other) is None)
        torch._check_value(
            getattr(c, given) is None or both, lambda given=given, other=other: f"{given} was given without {other}"
        )
    sizes = _shared(c)
    valid.floating(decay=c.decay)
    valid.integral(cu_seqlens_k=c.cu_seqlens_k)
    if c.softcap is not None:
        torch._check_value(c.softcap > 0, lambda: f"softcap must be above 0, got {c.softcap}")
    if c.gap is not None:
        torch._check_value(c.gap >= 0, lambda: f"gap must be at least 0, got {c.gap}")
    torch._check_value(c.decay is None or c.gap is not None, lambda: "decay was given without gap")
    return sizes


def decoding(c: Decoding) -> valid.Sizes:
    """The arguments of one decode step against packed caches; sizes may be symbolic."""
    return _shared(c)


def _shared(c: Call | Prefill | Decoding) -> valid.Sizes:
    sizes = valid.axes(c, grouped=GROUPED)
    valid.same_dtype(q=c.q, k=c.k, v=c.v)
    valid.floating(g=c.g, sink_bias=c.sink_bias)
    valid.same_device(c)
    if c.window_size is not None:
        torch._check_value(c.window_size >= 0, lambda: f"window_size must be at least 0, got {c.window_size}")
    return sizes


eager = valid.once(inputs)
eager_prefill = valid.once(prefill)
eager_decoding = valid.once(decoding)
