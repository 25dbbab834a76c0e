"""The definition of attn: softmax attention with decay, row by row. Slow, plain, differentiable by autograd."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    sink_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x_ij = scale q_i.k_j + g_{j+1} + ... + g_i for i - window_size < j <= i in one sequence.

    o_i = sum_j exp(x_ij) v_j / z_i with z_i = sum_j exp(x_ij) + exp(sink_bias), zero where row i sees no key; returns
    o [B, T, HQ, V] and log z [B, T, HQ].
    """
    return prefill(q, k, v, g, scale, window_size, cu_seqlens, cu_seqlens, sink_bias)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sink_bias: Tensor | None = None,
    softcap: float | None = None,
    gap: int | None = None,
    decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for queries [B, T, HQ, K] at the last T of the keys' TK steps or, with `gap`, that many steps past them.

    Products are first capped, softcap tanh(scale q_i.k_j / softcap). Past the keys, gates end with the last key's, and
    decay_i is added.
    """
    if cu_seqlens is not None and cu_seqlens_k is not None:
        runs = []
        for (a, b), (c, d) in zip(pairwise(cu_seqlens.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
            gates, decays = None if g is None else g[:, c:d], None if decay is None else decay[:, a:b]
            tensors = (q[:, a:b], k[:, c:d], v[:, c:d], gates)
            runs.append(prefill(*tensors, scale, window_size, None, None, sink_bias, softcap, gap, decays))
        return torch.cat([o for o, _ in runs], 1), torch.cat([log for _, log in runs], 1)

    (batch, time, heads, key_width), count = q.shape, k.shape[1]
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    scale = key_width**-0.5 if scale is None else scale
    group = heads // k.shape[2]
    queries = q.to(dtype)
    keys, values = (x.to(dtype).repeat_interleave(group, 2) for x in (k, v))
    sink = torch.full((heads,), float("-inf"), dtype=dtype, device=q.device)
    if sink_bias is not None:
        sink = sink_bias.to(dtype)
    outputs = [values.new_zeros(batch, 0, heads, v.shape[3])]
    sums = [values.new_zeros(batch, 0, heads)]
    for row in range(time):
        i = row + count - time if gap is None else row + count + gap
        first = 0 if window_size is None else max(0, i - window_size + 1)
        end = max(first, min(i + 1, count))
        x = scale * (queries[:, row, None] * keys[:, first:end]).sum(-1)  # [B, j, HQ]
        if softcap is not None:
            x = softcap * torch.tanh(x / softcap)
        if g is not None and first < end:
            since = [g[:, j + 1 : end].to(dtype).sum(1) for j in range(first, end)]
            x = x + torch.stack(since, 1)
        if decay is not None:
            x = x + decay[:, row, None].to(dtype)
        log = torch.logsumexp(torch.cat([x, sink.expand(batch, 1, heads)], 1), 1, keepdim=True)
        outputs.append((torch.exp(x - log)[..., None] * values[:, first:end]).sum(1, keepdim=True))
        sums.append(log)
    return torch.cat(outputs, 1).to(q.dtype), torch.cat(sums, 1)


def one_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    cu_seqlens: Tensor,
    do_gate_scale: bool = False,
    sink_bias: Tensor | None = None,
    window_size: int | None = None,
) -> Tensor:
    """What the last row of each packed sequence would be with its query in q [1, N, HQ, K]; zeros where it is empty."""
    heads, value_width = q.shape[2], v.shape[3]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    g = g * scale if g is not None and do_gate_scale else g
    outputs = [q.new_zeros(1, 0, heads, value_width)]
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        if start == end:
            outputs.append(q.new_zeros(1, 1, heads, value_width))
            continue
        queries = torch.cat([q.new_zeros(1, end - start - 1, heads, q.shape[3]), q[:, n : n + 1]], 1)
        gate = None if g is None else g[:, start:end]
        o, _ = parallel(queries, k[:, start:end], v[:, start:end], gate, scale, window_size, None, sink_bias)
        outputs.append(o[:, -1:])
    return torch.cat(outputs, 1)
