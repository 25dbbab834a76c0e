"""gsa as ATen calls for graphs: every sequence at once, without reading a value. `inlining()` and `decompositions()`
use it for both forms; traced_pools.py has the decode step and the operators for servers.

Inside a chunk of C steps the weight of step j's memory slot m at step i is formed for every pair, with P the running
sum of g; A and C are the states before the chunk:

    W_ijm = exp(P_im - P_jm) s_jm for j <= i
    x_im  = sum_j (q_i . k_j) W_ijm + exp(P_im) (A^T q_i)_m        q already scaled
    p     = softmax(x)
    o_i   = sum_j (sum_m p_im W_ijm) v_j + C^T (exp(P_i) p_i)

Tensors are [lanes, H, rows, C, width], those of the queries [lanes, H, rows, C, G, width]; layouts.py has lanes and
rows. A chunk is short, for W holds C numbers for each slot of each step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fla_ops.common.cpu.layouts import Dense, Packed, layout_of, running, weights, whole
from fla_ops.validation import state_dtype

from .. import checks
from ..call import Call, Gradients, Kept, Need, Outputs, Record, Recorded
from ..stopping import moved_on, stops_in

CHUNK = 16
NEVER = float("-inf")


class Chunks(NamedTuple):
    """One call in chunks."""

    layout: Dense | Packed
    q: Tensor  # scaled
    k: Tensor
    v: Tensor
    s: Tensor
    decay: Tensor  # exp(P_i - P_j), [lanes, H, rows, C, C, M]
    from_start: Tensor  # exp(P_i), [lanes, H, rows, C, M]
    to_end: Tensor  # exp(P_C - P_j), [lanes, H, rows, C, M]
    log_total: Tensor  # P_C, [lanes, H, M, rows]

    @property
    def written(self) -> Tensor:
        """W, [lanes, H, rows, C, C, M]"""
        return self.decay * self.s.unsqueeze(-3)

    @property
    def carried(self) -> Tensor:
        """What enters the states at the chunk's end, with the weights of the memory slots. A decay that is no number is
        left to log_total, which reaches no earlier chunk.
        """
        return self.s * self.to_end.nan_to_num(0.0, 0.0)

    def scan(self, updates: Tensor, initial: Tensor | None, backwards: bool = False) -> tuple[Tensor, Tensor]:
        """The states [lanes, H, rows, width, M] before each chunk, and the last ones [N, H, width, M]."""
        updates = updates.movedim(-1, 2).unsqueeze(-1)  # each memory slot has a decay of its own
        initial = None if initial is None else initial.to(updates.dtype).movedim(-1, 2).unsqueeze(-1)
        states, final = self.layout.scan(updates, self.log_total, initial, backwards)
        return states.squeeze(-1).movedim(2, -1), final.squeeze(-1).movedim(2, -1)


class States(NamedTuple):
    """Both states before each chunk, [lanes, H, rows, K or V, M], and the last ones."""

    k: Tensor
    v: Tensor
    final_k: Tensor
    final_v: Tensor


class Reading(NamedTuple):
    """What the queries read."""

    scores: Tensor  # q . k for j <= i, [lanes, H, rows, C, G, C]
    p: Tensor  # [lanes, H, rows, C, G, M]
    before: Tensor  # of x, what comes from before the chunk


def forward(c: Call) -> Outputs:
    """Both forms: o in v's dtype, and the final states."""
    x = _chunks(c)
    states = _states(x, c.initial_k, c.initial_v)
    o = _outputs(c, x, states)
    final = (states.final_k, states.final_v.mT) if c.output_final_state else (None, None)
    return Outputs(o, *(None if y is None else y.contiguous() for y in final))


def chunk_forward(c: Call) -> Kept:
    """The chunk form. It keeps nothing: what partitions a graph with its gradient decides what is kept."""
    return Kept(*forward(c), None, None, None, None)


def record(c: Record) -> Recorded:
    """o where there are queries, the states after every few steps or where `at` says, and the final ones."""
    checks.record(c)
    one = c.call()
    x = _chunks(one)
    states = _states(x, one.initial_k, one.initial_v)
    o = None if c.q is None else _outputs(one, x, states)
    pairs = ((states.k, states.final_k), (states.v, states.final_v))
    if c.at is None:
        kept = [x.layout.every(c.every, *pair) for pair in pairs]
    else:
        stops = stops_in(c, CHUNK)
        after_k, after_v = (x.layout.after(stops.chunks.flatten(), stops.owner, *pair) for pair in pairs)
        kept_k, kept_v = moved_on(c, stops, (after_k, after_v.mT), lambda rest: forward(rest)[1:])
        kept = [kept_k, kept_v.mT]
    return Recorded(o, *(y.contiguous() for y in (kept[0], kept[1].mT, states.final_k, states.final_v.mT)))


def chunk_backward(c: Call, d: Outputs, need: Need, saved: Kept) -> Gradients:
    """The gradient of the chunk form."""
    return backward(c, d, need)


def backward(c: Call, d: Outputs, need: Need) -> Gradients:
    """The gradients that are needed, each in its input's dtype."""
    x = _chunks(c)
    states = _states(x, c.initial_k, c.initial_v)
    scores, p, before = _read(x, states)
    w, from_start = x.written, x.from_start.unsqueeze(-2)
    do = _grouped(x.layout.split(d.o, x.v.dtype), c.v.shape[2])
    final_v = None if d.final_v is None else d.final_v.mT
    dstates_v, dinitial_v = x.scan(_over_steps(do, p * from_start), final_v, backwards=True)
    dproducts = _causal(do @ x.v.mT.unsqueeze(-3))
    read = (do @ states.v.unsqueeze(-3)) * from_start
    dp = dproducts @ w + read
    dx = p * (dp - (p * dp).sum(-1, keepdim=True))
    dstates_k, dinitial_k = x.scan(_over_steps(x.q, dx * from_start), d.final_k, backwards=True)
    dscores = _causal(dx @ w.mT)
    dw = dproducts.mT @ p + scores.mT @ dx
    across = x.k @ dstates_k + x.v @ dstates_v
    ds = (dw * x.decay).sum(-3) + across * x.to_end
    dg = None
    if need.g or (c.g is None and need.s):
        inside = (dw * w).movedim(-1, 3).tril(-1)  # without the diagonal, which would cancel
        reads = inside.sum(-1).movedim(3, -1) + (p * read + dx * before).sum(-2)
        dg = _gate_gradient(x, reads - inside.sum(-2).movedim(3, -1), across * x.carried, states, dstates_k, dstates_v)
        if c.g is None:
            ds = _abc_gradient(x, ds, dg, _real(c, x.layout))
    dq = dscores @ x.k.unsqueeze(-3) + (dx * from_start) @ states.k.mT.unsqueeze(-3)
    dk = _over_queries(dscores, x.q) + x.carried @ dstates_k.mT
    dv = _over_queries(_causal(p @ w.mT), do) + x.carried @ dstates_v.mT
    return Gradients(
        _join(x, dq * c.factor, c.q.dtype) if need.q else None,
        x.layout.join(dk, c.k.dtype) if need.k else None,
        x.layout.join(dv, c.v.dtype) if need.v else None,
        x.layout.join(ds, c.s.dtype) if need.s else None,
        torch.where(c.g.exp() == 0, 0, x.layout.join(dg, c.g.dtype)) if need.g else None,
        dinitial_k.to(c.initial_k.dtype).contiguous() if need.initial_k else None,
        dinitial_v.mT.to(c.initial_v.dtype).contiguous() if need.initial_v else None,
    )


def _chunks(c: Call) -> Chunks:
    layout, dtype = layout_of(c, CHUNK), state_dtype(c.v)
    q, k, v, s = (layout.split(x, dtype) for x in (c.q, c.k, c.v, c.s))
    s, g = _abc(layout, s, _real(c, layout)) if c.g is None else (s, layout.split(c.g, dtype))
    sums = running(g.double().movedim(-1, 2))  # [lanes, H, M, rows, C]
    within = weights(sums, dtype)
    from_start, to_end = sums.to(dtype).exp(), within[..., -1, :]
    log_total = whole(sums[..., -1], from_start, to_end)
    q = _grouped(q, c.v.shape[2]) * c.factor
    return Chunks(layout, q, k, v, s, *(y.movedim(2, -1) for y in (within, from_start, to_end)), log_total)


def _states(x: Chunks, initial_k: Tensor | None, initial_v: Tensor | None) -> States:
    before_k, final_k = x.scan(x.k.mT @ x.carried, initial_k)
    before_v, final_v = x.scan(x.v.mT @ x.carried, None if initial_v is None else initial_v.mT)
    return States(before_k, before_v, final_k, final_v)


def _read(x: Chunks, states: States) -> Reading:
    scores = _causal(x.q @ x.k.mT.unsqueeze(-3))
    before = (x.q @ states.k.unsqueeze(-3)) * x.from_start.unsqueeze(-2)
    return Reading(scores, (scores @ x.written + before).softmax(-1), before)


def _outputs(c: Call, x: Chunks, states: States) -> Tensor:
    """o as it is returned."""
    p = _read(x, states).p
    across = (p * x.from_start.unsqueeze(-2)) @ states.v.mT.unsqueeze(-3)
    return _join(x, _causal(p @ x.written.mT) @ x.v.unsqueeze(-3) + across, c.v.dtype)


def _causal(scores: Tensor) -> Tensor:
    """Scores [..., C, G, C] of the steps j <= i; else 0."""
    return scores.movedim(-2, -3).tril().movedim(-3, -2)


def _grouped(y: Tensor, heads: int) -> Tensor:
    """[lanes, HQ, rows, C, width] to [lanes, H, rows, C, G, width]."""
    return y.unflatten(1, (heads, -1)).movedim(2, 4)


def _join(x: Chunks, y: Tensor, dtype: torch.dtype) -> Tensor:
    """[lanes, H, rows, C, G, width] to [B, T, HQ, width]."""
    return x.layout.join(y.movedim(4, 2).flatten(1, 2), dtype)


def _over_steps(a: Tensor, b: Tensor) -> Tensor:
    """sum over the queries of a chunk, a [..., C, G, U]^T b [..., C, G, W]: [..., U, W]."""
    return a.flatten(-3, -2).mT @ b.flatten(-3, -2)


def _over_queries(scores: Tensor, y: Tensor) -> Tensor:
    """sum over the queries of scores [..., C, G, C] times y [..., C, G, U], for each step that is seen: [..., C, U]."""
    return scores.flatten(-3, -2).mT @ y.flatten(-3, -2)


def _gate_gradient(
    x: Chunks, inside: Tensor, across: Tensor, states: States, dstates_k: Tensor, dstates_v: Tensor
) -> Tensor:
    """The gradient of g: of all that passes from before a step to it or past it; see passes.gate_gradient."""
    left = (states.k * dstates_k).sum(-2) + (states.v * dstates_v).sum(-2)
    left = left * x.log_total.to(left.dtype).exp().movedim(2, -1)
    return inside.flip(-2).cumsum(-2).flip(-2) + across.cumsum(-2) - across + left.unsqueeze(-2)


def _abc(layout: Dense | Packed, s: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """ABC's weights and gates, see abc.py, of s [lanes, H, rows, C, M] in chunks; zeros past a sequence's end."""
    earlier = torch.ones_like(s[0, 0, 0, :, :1].expand(-1, s.shape[3])).tril()
    pairs = s.unsqueeze(-3).masked_fill(earlier.unsqueeze(-1) == 0, NEVER)  # [..., C, C, M]
    inside = pairs.logsumexp(-2)
    row = torch.arange(s.shape[2], device=s.device)
    sequence = _begins(layout, row).long().cumsum(0)
    hidden = (row >= row[:, None]) | (sequence != sequence[:, None])
    ends = inside[..., -1, :].movedim(-1, 2).unsqueeze(-2).masked_fill(hidden, NEVER)  # [lanes, H, M, rows, rows]
    entering = ends.logsumexp(-1).movedim(2, -1).unsqueeze(-2)
    z = torch.stack([inside, entering.expand_as(inside)]).logsumexp(0)
    before = torch.cat([torch.where(entering == NEVER, z[..., :1, :], entering), z[..., :-1, :]], -2)
    return torch.where(real, (s - z).exp(), 0), torch.where(real, (before - z).clamp(max=0), 0)


def _abc_gradient(x: Chunks, dw: Tensor, dg: Tensor, real: Tensor) -> Tensor:
    """The gradient of s from those of ABC's weights and gates, see abc.py, all in chunks.

    Its sum over the later steps is a recurrence against time whose decays are the gates.
    """
    row = torch.arange(dw.shape[2], device=dw.device)
    first = _begins(x.layout, row)[:, None] & (torch.arange(dw.shape[3], device=dw.device) == 0)
    dg = torch.where(first.unsqueeze(-1), 0, torch.where(real, dg, 0))
    next_dg = pad(dg.flatten(2, 3)[:, :, 1:], (0, 0, 0, 1)).unflatten(2, (-1, dw.shape[3]))
    dz = next_dg - dg - x.s * dw
    carried, _ = x.scan((dz * x.from_start).sum(-2, keepdim=True), None, backwards=True)
    later = (x.decay * dz.unsqueeze(-2)).sum(-3) + x.to_end * carried
    return x.s * (dw + later)


def _real(c: Call, layout: Dense | Packed) -> Tensor:
    """Which steps of the chunks are steps of the call, [lanes, 1, rows, C, 1]."""
    return layout.split(torch.ones_like(c.s[:, :, :1, :1]), torch.float32) > 0


def _begins(layout: Dense | Packed, row: Tensor) -> Tensor:
    """Which rows begin a sequence."""
    return layout.first if isinstance(layout, Packed) else row == 0
