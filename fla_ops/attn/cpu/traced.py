"""attn as ATen calls for graphs: every sequence at once, without reading a value. `inlining()` and `decompositions()`
use it.

Scores of all pairs are formed, [B, H, G, rows, columns] with G the query heads of a key head, and what a row does not
see is -inf there: later keys, those before its window, those of other sequences, those before a step that forgets. So
memory grows with the square of the time. A number that is not finite, in v or in a gate, reaches all of a pack.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.common.cpu.layouts import owners
from fla_ops.validation import Size, cu_seqlens_values_async, state_dtype

from ..call import FORGETS, RESIDUAL_SCALE, Call, Decoding, Gradients, Need, Outputs

NEVER = float("-inf")


def forward(c: Call) -> Outputs:
    """o, the logarithm of each row's denominator, and o's rounding residual if that is asked for."""
    scores = _scores(c)
    lse = _denominators(scores, c.sink_bias)
    out = _leave(_weights(scores, lse) @ _enter(c, c.v))
    o = out.to(c.q.dtype, copy=True, memory_format=torch.contiguous_format)
    half = c.output_rest and o.dtype is not out.dtype
    rest = ((out - o) * RESIDUAL_SCALE).to(o.dtype) if half else None
    return Outputs(o, _leave(lse).squeeze(-1), rest)


def backward(c: Call, d: Outputs, need: Need, saved: Outputs) -> Gradients:
    """The gradients that are needed, each in its input's dtype."""
    wide, queries, keys, do = state_dtype(c.q), _enter(c, c.q), _enter(c, c.k), _enter(c, d.o)
    lse = _enter(c, saved.lse[..., None])
    out = saved.o.to(wide)
    if saved.rest is not None:
        out = out + saved.rest.to(wide) / RESIDUAL_SCALE
    delta = (do * _enter(c, out)).sum(-1, keepdim=True)
    if d.lse is not None:
        delta = delta - _enter(c, d.lse[..., None])
    weights = _weights(_scores(c), lse)
    dscores = weights * (do @ _enter(c, c.v).mT - delta)
    dg = dsink = None
    if need.g:
        added = (dscores.sum(-1) - dscores.sum(-2)).double().flatten(1, 2).mT
        dg = torch.where(c.g <= FORGETS, 0, _later(added, c.cu_seqlens, inclusive=True)).to(c.g.dtype)
    if need.sink_bias:
        sink = c.sink_bias.to(wide).unflatten(0, (c.k.shape[2], -1))[..., None, None]
        share = torch.where(lse == NEVER, 0, (sink - lse).exp()) * delta
        dsink = -share.sum((0, 3, 4), dtype=torch.float64).flatten().to(c.sink_bias.dtype)
    return (
        _leave(dscores @ keys * c.factor).to(c.q.dtype) if need.q else None,
        _of_keys(dscores.mT @ queries * c.factor, c.k.dtype) if need.k else None,
        _of_keys(weights.mT @ do, c.v.dtype) if need.v else None,
        dg,
        dsink,
    )


def one_step(c: Decoding) -> Tensor:
    """o [1, N, HQ, V] in q's dtype; zeros where no key is seen."""
    time = c.k.shape[1]
    cu_seqlens_values_async(c.cu_seqlens, time)
    first, last = (x.long()[:, None] for x in (c.cu_seqlens[:-1], c.cu_seqlens[1:]))
    if c.window_size is not None:
        first = torch.maximum(first, last - c.window_size)
    step = torch.arange(time, device=c.k.device)
    scores = _products(c)
    if c.g is not None:
        gates = c.g.double() * c.factor if c.do_gate_scale else c.g.double()
        forgets = gates <= FORGETS
        decay = _later(torch.where(forgets, 0, gates), c.cu_seqlens, inclusive=False)
        hidden = _later(forgets.double(), c.cu_seqlens, inclusive=False) > 0.5
        scores = scores + _columns(c, torch.where(hidden, NEVER, decay).to(scores.dtype))
    scores = scores.masked_fill((step < first) | (step >= last), NEVER)
    weights = _weights(scores, _denominators(scores, c.sink_bias))
    return _leave(weights @ _enter(c, c.v)).to(c.q.dtype)


def _scores(c: Call) -> Tensor:
    """The exponents of the weights, -inf where a row sees nothing."""
    scores, time = _products(c), c.q.shape[1]
    step = torch.arange(time, device=c.q.device)
    row, column = step[:, None], step[None]
    hidden = column > row
    if c.window_size is not None:
        hidden = hidden | (column <= row - c.window_size)
    if c.cu_seqlens is not None:
        cu_seqlens_values_async(c.cu_seqlens, time)
        owner = _owner(c.cu_seqlens, time)
        hidden = hidden | (owner[:, None] != owner[None])
    if c.g is not None:
        forgets = c.g <= FORGETS
        sums = torch.where(forgets, 0, c.g.double()).cumsum(1)
        scores = scores + (_rows(c, sums) - _columns(c, sums)).to(scores.dtype)
        count = forgets.long().cumsum(1)
        hidden = hidden | (_rows(c, count) != _columns(c, count))
    return scores.masked_fill(hidden, NEVER)


def _products(c: Call | Decoding) -> Tensor:
    """q . k, scaled, of all pairs."""
    return (_enter(c, c.q) * c.factor) @ _enter(c, c.k).mT


def _denominators(scores: Tensor, sink_bias: Tensor | None) -> Tensor:
    """The logarithm of each row's denominator, with the sink in it: [..., rows, 1]."""
    lse = scores.logsumexp(-1, keepdim=True)
    if sink_bias is None:
        return lse
    sink = sink_bias.to(lse.dtype).unflatten(0, (lse.shape[1], -1))[..., None, None]
    return torch.stack([lse, sink.expand_as(lse)]).logsumexp(0)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """Each row's weights; zeros where it sees nothing."""
    return (scores - torch.where(lse == NEVER, 0, lse)).exp()


def _later(x: Tensor, cu_seqlens: Tensor | None, inclusive: bool) -> Tensor:
    """The sum of x [B, T, heads] over the later steps of the same sequence, and the step itself if `inclusive`."""
    if cu_seqlens is None:
        sums = x.flip(1).cumsum(1).flip(1)
        return sums if inclusive else sums - x
    sums = x.cumsum(1)
    last = (cu_seqlens[1:].long() - 1)[_owner(cu_seqlens, x.shape[1])]
    rest = sums[:, last] - sums
    return rest + x if inclusive else rest


def _owner(cu_seqlens: Tensor, time: Size) -> Tensor:
    """The sequence of each step; offsets that are no offsets name the last one."""
    return owners(cu_seqlens[1:].long(), time).clamp(max=cu_seqlens.shape[0] - 2)


def _enter(c: Call | Decoding, x: Tensor) -> Tensor:
    """[B, T, HQ or H, width] to [B, H, G or 1, T, width], in the dtype of the computation."""
    return x.to(state_dtype(c.q)).unflatten(2, (c.k.shape[2], -1)).permute(0, 2, 3, 1, 4)


def _leave(y: Tensor) -> Tensor:
    """[B, H, G, T, width] to [B, T, HQ, width]."""
    return y.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def _of_keys(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a key or value head, from those for each query head of it."""
    return _leave(y.sum(2, keepdim=True)).to(dtype)


def _rows(c: Call | Decoding, x: Tensor) -> Tensor:
    """Numbers [B, T, HQ] of the rows, to meet scores."""
    return x.unflatten(2, (c.k.shape[2], -1)).permute(0, 2, 3, 1).unsqueeze(-1)


def _columns(c: Call | Decoding, x: Tensor) -> Tensor:
    """Numbers [B, T, HQ] of the columns, to meet scores."""
    return _rows(c, x).mT
