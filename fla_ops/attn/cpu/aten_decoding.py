"""One decode step of attn on a CPU: each sequence's query against the keys of its cache that it sees."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fla_ops import validation as valid

from .. import checks
from ..call import Decoding

LINE = 64  # bytes: where the allocator lets a tensor begin


def one_step(c: Decoding) -> Tensor:
    """o [1, N, HQ, V] in q's dtype; zeros where no key is seen."""
    checks.eager_decoding(c)
    dtype = valid.state_dtype(c.q)
    o = c.q.new_zeros((*c.q.shape[:3], c.v.shape[3]))
    sink = None if c.sink_bias is None else c.sink_bias.to(dtype).view(c.k.shape[2], -1, 1)
    for n, (start, end) in enumerate(pairwise(valid.cu_seqlens_values(c.cu_seqlens, c.k.shape[1]))):
        first = start if c.window_size is None else max(start, end - c.window_size)
        if first == end:
            continue
        queries = (c.q[0, n].to(dtype) * c.factor).view(c.k.shape[2], -1, c.q.shape[3])  # [H, G, K]
        keys, values = (aligned(x[0, first:end].to(dtype)).transpose(0, 1) for x in (c.k, c.v))  # [H, L, D]
        x = torch.bmm(queries, keys.mT)
        if c.g is not None:
            x += _decays(c, first, end).to(dtype).view_as(x)
        if sink is not None:
            x = torch.cat([x, sink], -1)
        weights = torch.softmax(x, -1)[..., : end - first]
        o[0, n] = torch.bmm(weights, values).flatten(0, 1)
    return o


def aligned(x: Tensor) -> Tensor:
    """x, contiguous and at the start of a cache line; copied only where it is not.

    Which kernel multiplies a matrix, and with that the last bits, may depend on where the matrix lies, and where a
    sequence's cache lies depends on the other sequences.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % LINE else x


def _decays(c: Decoding, first: int, end: int) -> Tensor:
    """The sum of the gates after each step of one cache, [HQ, L] in float64, from the last step to the first."""
    later = c.g.new_zeros((c.g.shape[2], end - first), dtype=torch.float64)
    later[:, 1:] = c.g[0, first + 1 : end].mT.flip(1)
    later.cumsum_(1)
    if c.do_gate_scale:
        later *= c.factor
    return later.flip(1)
