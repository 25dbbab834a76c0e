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

from ..call import (
    FORGETS,
    RESIDUAL_SCALE,
    SAME,
    Call,
    Decoding,
    Gradients,
    Need,
    Outputs,
    Prefill,
    PrefillNeed,
)

NEVER = float("-inf")


def forward(c: Call | Prefill) -> Outputs:
    """o, the logarithm of each row's denominator, and o's rounding residual if that is asked for."""
    scores, _ = _scores(c)
    lse = _denominators(scores, c.sink_bias)
    out = _leave(_weights(scores, lse) @ _enter(c, c.v))
    o = out.to(c.q.dtype, copy=True, memory_format=torch.contiguous_format)
    half = c.output_rest and o.dtype is not out.dtype
    rest = ((out - o) * RESIDUAL_SCALE).to(o.dtype) if half else None
    return Outputs(o, _leave(lse).squeeze(-1), rest)


def backward(c: Call | Prefill, d: Outputs, need: Need | PrefillNeed, saved: Outputs) -> Gradients:
    """The gradients that are needed, each in its input's dtype."""
    wide, queries, keys, do = state_dtype(c.q), _enter(c, c.q), _enter(c, c.k), _enter(c, d.o)
    lse = _enter(c, saved.lse[..., None])
    out = saved.o.to(wide)
    if saved.rest is not None:
        out = out + saved.rest.to(wide) / RESIDUAL_SCALE
    delta = (do * _enter(c, out)).sum(-1, keepdim=True)
    if d.lse is not None:
        delta = delta - _enter(c, d.lse[..., None])
    scores, slopes = _scores(c)
    weights = _weights(scores, lse)
    dscores = weights * (do @ _enter(c, c.v).mT - delta)
    dg = dsink = ddecay = None
    if need.g:
        added = _from_sums(c, *(dscores.sum(i).double().flatten(1, 2).mT for i in (-1, -2)))
        dg = torch.where(c.g <= FORGETS, 0, _later(added, c.key_offsets, inclusive=True)).to(c.g.dtype)
    if need.decay:
        ddecay = dscores.sum(-1).flatten(1, 2).mT.to(c.decay.dtype, memory_format=torch.contiguous_format)
    if slopes is not None:
        dscores = dscores * slopes
    if need.sink_bias:
        sink = c.sink_bias.to(wide).unflatten(0, (c.k.shape[2], -1))[..., None, None]
        share = torch.where(lse == NEVER, 0, (sink - lse).exp()) * delta
        dsink = -share.sum((0, 3, 4), dtype=torch.float64).flatten().to(c.sink_bias.dtype)
    found = {
        "q": _leave(dscores @ keys * c.factor).to(c.q.dtype) if need.q else None,
        "k": _of_keys(dscores.mT @ queries * c.factor, c.k.dtype) if need.k else None,
        "v": _of_keys(weights.mT @ do, c.v.dtype) if need.v else None,
        "g": dg,
        "sink_bias": dsink,
        "decay": ddecay,
    }
    return tuple(found[name] for name in need._fields)


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


def _scores(c: Call | Prefill) -> tuple[Tensor, Tensor | None]:
    """The exponents of the weights, -inf where a row sees nothing; the derivatives of the products that are capped."""
    scores, slopes = _products(c), None
    if c.softcap is not None:
        share = torch.tanh(scores / c.softcap)
        scores, slopes = share * c.softcap, 1 - share * share
    row, column, last, hidden = _positions(c)
    hidden = hidden | (column > row)
    if c.window_size is not None:
        hidden = hidden | (column <= row - c.window_size)
    if c.g is not None:
        forgets = c.g <= FORGETS
        sums = torch.where(forgets, 0, c.g.double()).cumsum(1)
        count = forgets.long().cumsum(1)
        sums_at_rows, count_at_rows = (_at(c, x, last) for x in (sums, count))
        scores = scores + (_rows(c, sums_at_rows) - _columns(c, sums)).to(scores.dtype)
        hidden = hidden | (_rows(c, count_at_rows) != _columns(c, count))
    if c.decay is not None:
        scores = scores + _rows(c, c.decay).to(scores.dtype)
    return scores.masked_fill(hidden, NEVER), slopes


def _positions(c: Call | Prefill) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where rows [T, 1] and columns [1, TK] lie in their sequences, the last column that each row may see [T], and
    which pairs are of two sequences.
    """
    time, count = c.q.shape[1], c.k.shape[1]
    row, column = (torch.arange(n, device=c.q.device) for n in (time, count))
    if c.cu_seqlens is None:
        place, apart = row + c.ahead(time, count), column.new_zeros((), dtype=torch.bool)
        last = place.clamp(max=count - 1)
    else:
        cu_seqlens_values_async(c.cu_seqlens, time)
        if c.place != SAME:
            cu_seqlens_values_async(c.key_offsets, count, "cu_seqlens_k", "TK")
        owner, owner_k = _owner(c.cu_seqlens, time), _owner(c.key_offsets, count)
        starts, starts_k = (x.long()[:-1] for x in (c.cu_seqlens, c.key_offsets))
        place = row - (starts - c.ahead(c.cu_seqlens.long().diff(), c.key_offsets.long().diff()))[owner]
        last = torch.minimum(place + starts_k[owner], (c.key_offsets.long()[1:] - 1)[owner])
        column, apart = column - starts_k[owner_k], owner[:, None] != owner_k
    return place[:, None], column[None], last.clamp(min=0), apart  # a row that sees no column may name any


def _at(c: Call | Prefill, x: Tensor, last: Tensor) -> Tensor:
    """Numbers of the columns [B, TK, HQ] at the last column that each row may see; there may be none at all."""
    return x if c.place == SAME else torch.nn.functional.pad(x, (0, 0, 0, 1))[:, last]


def _from_sums(c: Call | Prefill, rows: Tensor, columns: Tensor) -> Tensor:
    """The gradient of the running sums of gates [B, TK, HQ], from that of the scores summed over rows and columns."""
    if c.place == SAME:
        return rows - columns
    last, count = _positions(c)[2], columns.shape[1]
    return torch.nn.functional.pad(-columns, (0, 0, 0, 1)).index_add(1, last, rows)[:, :count]


def _products(c: Call | Prefill | Decoding) -> Tensor:
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


def _enter(c: Call | Prefill | Decoding, x: Tensor) -> Tensor:
    """[B, T, HQ or H, width] to [B, H, G or 1, T, width], in the dtype of the computation."""
    return x.to(state_dtype(c.q)).unflatten(2, (c.k.shape[2], -1)).permute(0, 2, 3, 1, 4)


def _leave(y: Tensor) -> Tensor:
    """[B, H, G, T, width] to [B, T, HQ, width]."""
    return y.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def _of_keys(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a key or value head, from those for each query head of it."""
    return _leave(y.sum(2, keepdim=True)).to(dtype)


def _rows(c: Call | Prefill | Decoding, x: Tensor) -> Tensor:
    """Numbers [B, T, HQ] of the rows, to meet scores."""
    return x.unflatten(2, (c.k.shape[2], -1)).permute(0, 2, 3, 1).unsqueeze(-1)


def _columns(c: Call | Prefill | Decoding, x: Tensor) -> Tensor:
    """Numbers [B, T, HQ] of the columns, to meet scores."""
    return _rows(c, x).mT
