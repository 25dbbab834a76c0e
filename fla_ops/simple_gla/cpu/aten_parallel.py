"""simple_gla on a CPU as the quadratic form, one block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fla_ops.common.cpu import decay as decays
from fla_ops.common.cpu.chunks import runs

from .. import checks
from .chunked import compute_dtype, scale_of

ROWS = 128
FORGET = -1000.0  # log decays are summed in float64, where one of this size is zero and does not hide the others


def forward(q, k, v, g, g_gamma, scale, output_attentions, cu_seqlens, cu_seqlens_cpu):
    """o = attn v; attn is materialised only where it is asked for."""
    checks.launch(q, k, v, g, g_gamma, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu)
    batch, time, heads, _ = v.shape
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    attn = v.new_zeros((batch, heads, time, time)) if output_attentions else None
    for _, start, end in runs(q, cu_seqlens):
        queries, keys, values, sums = _heads_first(q, k, v, g, g_gamma, scale, start, end)
        for a, b in _blocks(end - start):
            scores = _weigh(queries[..., a:b, :] @ keys[..., :b, :].mT, sums, a, b)
            o[:, start + a : start + b] = (scores @ values[..., :b, :]).flatten(1, 2).transpose(1, 2)
            if attn is not None:
                every_head = scores.expand(-1, -1, values.shape[2], -1, -1).flatten(1, 2)
                attn[:, :, start + a : start + b, start : start + b] = every_head
    return o, attn


def backward(q, k, v, g, g_gamma, cu_seqlens, do, dattn, scale, output_mask):
    """The gradients that output_mask asks for; scores are computed again, block by block."""
    need_q, need_k, need_v, need_g, need_gamma = output_mask
    need_gate = need_g or need_gamma
    wanted = (need_q, need_k, need_v, need_g)
    grads = [x.new_empty(x.shape) if want else None for x, want in zip((q, k, v, g), wanted, strict=True)]
    dgamma = v.new_zeros(v.shape[2], dtype=compute_dtype(v)) if need_gamma else None
    for _, start, end in runs(q, cu_seqlens):
        queries, keys, values, sums = _heads_first(q, k, v, g, g_gamma, scale, start, end)
        upstream = do[:, start:end].to(values.dtype).transpose(1, 2).unflatten(1, (k.shape[2], -1))
        per_head = upstream.shape[:4]
        dqueries, dkeys = (values.new_zeros((*per_head, k.shape[3])) for _ in range(2))
        dvalues = torch.zeros_like(values)
        for a, b in _blocks(end - start):
            rows, columns = upstream[..., a:b, :], keys[..., :b, :]
            dscores = rows @ values[..., :b, :].mT
            if dattn is not None:
                part = dattn[:, :, start + a : start + b, start : start + b]
                dscores += part.to(values.dtype).unflatten(1, (k.shape[2], -1))
            dscores = _weigh(dscores, sums, a, b)
            dqueries[..., a:b, :] = dscores @ columns
            dkeys[..., :b, :] += dscores.mT @ queries[..., a:b, :]
            if need_v:
                dvalues[..., :b, :] += _weigh(queries[..., a:b, :] @ columns.mT, sums, a, b).mT @ rows
        if need_gate:
            along = (queries * dqueries).sum(-1) - (keys * dkeys).sum(-1)
            dg = along.flip(-1).cumsum(-1).flip(-1).flatten(1, 2).mT
            steps = g[:, start:end] if g is not None else g_gamma
            dg = torch.where(steps.to(dg.dtype).exp() == 0, 0, dg)
            if need_gamma:
                dgamma += dg.sum((0, 1))
            else:
                grads[3][:, start:end] = dg
        parts = (dqueries.sum(2) * scale_of(q, scale), dkeys.sum(2), dvalues.flatten(1, 2))
        for whole, part in zip(grads[:3], parts, strict=True):
            if whole is not None:
                whole[:, start:end] = part.transpose(1, 2)
    return *grads, dgamma.to(g_gamma.dtype) if need_gamma else None


def _blocks(time: int) -> Iterator[tuple[int, int]]:
    for a in range(0, time, ROWS):
        yield a, min(a + ROWS, time)


def _heads_first(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    scale: float | None,
    start: int,
    end: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """[B, HK, 1 or G, T, D] for q (scaled), k and v, and the running sum of log decays [B, HK, G, T] in float64."""
    dtype, key_heads = compute_dtype(v), k.shape[2]
    queries, keys = (x[:, start:end].to(dtype).transpose(1, 2).unsqueeze(2) for x in (q, k))
    values = v[:, start:end].to(dtype).transpose(1, 2).unflatten(1, (key_heads, -1))
    sums = None
    if g is not None:
        sums = g[:, start:end].mT.unflatten(1, (key_heads, -1)).double().clamp(min=FORGET).cumsum(-1)
    elif g_gamma is not None:
        position = torch.arange(end - start, dtype=torch.float64, device=v.device)
        sums = (g_gamma.double().clamp(min=FORGET).unflatten(0, (key_heads, -1))[..., None] * position)[None]
    return queries * scale_of(q, scale), keys, values, sums


def _weigh(products: Tensor, sums: Tensor | None, a: int, b: int) -> Tensor:
    """Rows a to b of the causal, decayed matrix: products_ij exp(sums_i - sums_j) for j <= i."""
    if sums is None:
        return products.tril_(a)
    exponent = (sums[..., a:b, None] - sums[..., None, :b]).to(products.dtype)
    future = torch.ones(b - a, b, dtype=torch.bool, device=products.device).triu_(a + 1)
    floor = decays.floor(exponent.dtype)
    weights = exponent.masked_fill_(future, floor).clamp_(min=floor).exp_()
    weights = torch.threshold_(weights, 1.001 * math.exp(floor), 0.0)  # exp(-inf) is slow on a CPU
    return products.mul_(weights) if weights.shape == products.shape else products * weights
