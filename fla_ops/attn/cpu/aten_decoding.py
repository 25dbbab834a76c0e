"""One decode step of attn on a CPU: each sequence's query against the keys of its cache that it sees."""

from __future__ import annotations

from itertools import pairwise

import torch

from fla_ops import validation as valid
from fla_ops.validation import scale_of

from .. import checks
from .aten_tiles import compute_dtype


def one_step(q, k, v, g, scale, cu_seqlens, do_gate_scale, sink_bias, window_size):
    """o [1, N, HQ, V] in q's dtype; zeros for an empty cache."""
    checks.decoding(q, k, v, g, cu_seqlens, sink_bias, window_size)
    dtype, (key_heads, key_width) = compute_dtype(q), k.shape[2:]
    factor = scale_of(q, scale)
    queries = (q[0].to(dtype) * factor).view(-1, key_heads, q.shape[2] // key_heads, key_width)  # [N, H, G, K]
    o = queries.new_zeros((*queries.shape[:3], v.shape[3]))
    sink = None if sink_bias is None else sink_bias.to(dtype).view(key_heads, -1, 1)
    offsets = valid.cu_seqlens_values(cu_seqlens, k.shape[1])
    for n, (start, end) in enumerate(pairwise(offsets)):
        if start == end:
            continue
        first = start if window_size is None else max(start, end - window_size)
        keys, values = (x[0, first:end].to(dtype).transpose(0, 1) for x in (k, v))  # [H, L, D]
        x = torch.bmm(queries[n], keys.mT)
        if g is not None:
            later = g.new_zeros((g.shape[2], end - first), dtype=torch.float64)  # from the last step to the first
            later[:, 1:] = g[0, first + 1 : end].mT.flip(1)
            later.cumsum_(1)
            if do_gate_scale:
                later *= factor
            x += later.to(dtype).flip(1).view_as(x)
        if sink is not None:
            x = torch.cat([x, sink], -1)
        weights = torch.softmax(x, -1)[..., : end - first]
        torch.bmm(weights, values, out=o[n])
    return o.view(*q.shape[:3], v.shape[3]).to(q.dtype)
