"""One decode step of attn on a CPU: the C++ kernel of this folder, or ATen for float64 or without a C++ compiler."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fla_ops import validation as valid
from fla_ops.common.cpu import build

from .. import checks
from ..call import Decoding
from . import aten_decoding

SOURCE = "attn/cpu/decoding.cpp"


class Arguments(build.Walks):
    """struct Call of decoding.cpp."""

    _fields_ = (
        ("window", ctypes.c_int64),
        ("gate_scale", ctypes.c_double),
        *((name, build.Steps) for name in ("q", "k", "v", "o")),
        *((name, ctypes.c_void_p) for name in ("g", "sink")),
    )


def one_step(c: Decoding) -> Tensor:
    """o [1, N, HQ, V] in q's dtype; zeros where no key is seen."""
    checks.eager_decoding(c)
    library = build.library(SOURCE, *(x for x in (c.q, c.g, c.sink_bias) if x is not None))
    if library is None:
        return aten_decoding.one_step(c)
    (_, sequences, heads, key_width), (_, time, key_heads, value_width) = c.q.shape, c.v.shape
    o = c.q.new_empty((1, sequences, heads, value_width))
    offsets = torch.tensor(valid.cu_seqlens_values(c.cu_seqlens, time))
    g, sink = (build.float32(x) for x in (c.g, c.sink_bias))
    arguments = Arguments.of(
        *(time, sequences, key_heads, heads, key_width, value_width),
        *(False, build.threads(time * heads * (key_width + value_width))),
        c.factor,
        *build.addresses(offsets, None),
        *(-1 if c.window_size is None else c.window_size, c.factor if c.do_gate_scale else 1.0),
        *build.steps(c.q, c.k, c.v, o),
        *build.addresses(g, sink),
    )
    library.decode(ctypes.byref(arguments))
    return o
