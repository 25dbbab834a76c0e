"""The parallel form of attn on a CPU: blocks of rows with a running softmax, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.validation import state_dtype

from .. import checks, outputs
from ..call import RESIDUAL_SCALE, Call, Gradients, Need, Outputs
from . import decay
from .aten_tiles import LOG2E, Piece, Run, Tile, pieces, prepare, query_heads, set_query_heads

LARGE = 2.0**40  # a row's weights in one tile may add up to this before they are taken relative to a larger score


def forward(c: Call) -> Outputs:
    """Every row's output and the logarithm of its denominator, and o's rounding residual if that is asked for."""
    checks.eager(c)
    o, lse, rest = outputs.without_keys(c) if c.window_size == 0 else outputs.empty(c)
    key_heads = c.k.shape[2]
    for piece in pieces(c):
        out, logs = _attend(prepare(c, piece))
        if c.sink_bias is not None:
            with_sink = torch.logaddexp(logs, _sinks(c, piece))
            out *= (logs - with_sink).exp_()
            logs = with_sink
        set_query_heads(o, piece, key_heads, out)
        if rest is not None:
            set_query_heads(rest, piece, key_heads, out.sub_(out.to(o.dtype)).mul_(RESIDUAL_SCALE))
        set_query_heads(lse[..., None], piece, key_heads, logs)
    return Outputs(o, lse, rest)


def backward(c: Call, d: Outputs, need: Need, saved: Outputs) -> Gradients:
    """The gradients that are needed, each in its input's dtype."""
    if c.window_size == 0:
        return outputs.gradients_without_keys(c, d, need)
    dtype, key_heads = state_dtype(c.q), c.k.shape[2]
    grads = [x.new_empty(x.shape) if want else None for want, x in zip(need[:4], (c.q, c.k, c.v, c.g), strict=True)]
    dsink = c.q.new_zeros((key_heads, c.q.shape[2] // key_heads), dtype=torch.float64) if need.sink_bias else None
    for piece in pieces(c):
        logs, upstream, out = (query_heads(x, piece, key_heads, dtype) for x in (saved.lse[..., None], d.o, saved.o))
        if saved.rest is not None:
            out.add_(query_heads(saved.rest, piece, key_heads, dtype), alpha=1 / RESIDUAL_SCALE)
        delta = (out * upstream).sum(-1, keepdim=True)
        if d.lse is not None:
            delta -= query_heads(d.lse[..., None], piece, key_heads, dtype)
        if dsink is not None:
            share = (_sinks(c, piece) - logs).exp_().mul_(delta)
            dsink[piece[2]] -= share.sum((2, 3), dtype=torch.float64)
        if not any(need[:4]):
            continue
        dq, dk, dv, dsums = _differentiate(prepare(c, piece), upstream, logs * LOG2E, delta, need)
        dg = None
        if dq is not None:
            dq.mul_(c.factor)
        if dk is not None:
            dk.div_(LOG2E)
        if dsums is not None:
            steps = query_heads(c.g[..., None], piece, key_heads, c.g.dtype).squeeze(-1)
            dg = decay.gradient(dsums, steps)
        for whole, part in zip(grads, (dq, dk, dv, dg), strict=True):
            if whole is not None:
                one = whole.dim() == 3
                set_query_heads(whole[..., None] if one else whole, piece, key_heads, part[..., None] if one else part)
    return *grads, dsink.flatten().to(c.sink_bias.dtype) if dsink is not None else None


def _sinks(c: Call, piece: Piece) -> Tensor:
    """The sinks of a piece, [P, G, 1, 1]."""
    return c.sink_bias.to(state_dtype(c.q)).view(c.k.shape[2], -1)[piece[2], :, None, None]


def _attend(run: Run) -> tuple[Tensor, Tensor]:
    """Outputs [P, G, T, V] and the logarithms of the denominators [P, G, T, 1], without the sinks.

    The diagonal block comes first: every row sees itself, so its largest score there is a reference from which the
    later ones, most of them lower, seldom run away.
    """
    pairs, group, time, _ = run.queries.shape
    result = run.queries.new_empty((pairs, group, time, run.values.shape[2]))
    logs = run.queries.new_empty((pairs, group, time, 1))
    for a, b in run.blocks():
        x = run.diagonal(a, b, None)
        reference = x.amax(-1, keepdim=True)
        weights = run.weights(x.sub_(reference), run.sums is not None)
        total = weights.sum(-1, keepdim=True)
        out = torch.bmm(weights, run.values[:, a:b])
        tiles = run.tiles(a, b, reference.unflatten(1, (group, -1)))
        if tiles:
            rows = run.extended(a, b, tiles[0].first, reference.unflatten(1, (group, -1)))
        for tile in reversed(tiles):
            weights = run.weights(run.scores(rows, a, tile), tile.negligible)
            added = weights.sum(-1, keepdim=True)
            if bool((added > LARGE).any()):
                x = run.scores(rows, a, tile)
                peak = x.amax(-1, keepdim=True)
                excess = torch.where(peak > 0, peak, 0)
                x.sub_(excess)
                rows[..., -1:] -= excess
                reference += excess
                total *= (-excess).exp2_()
                out *= (-excess).exp2_()
                weights = run.weights(x, tile.negligible)
                added = weights.sum(-1, keepdim=True)
            total += added
            out.baddbmm_(weights, run.values[:, tile.first : tile.last])
        result[:, :, a:b] = out.div_(total).unflatten(1, (group, -1))
        logs[:, :, a:b] = total.log2_().add_(reference).div_(LOG2E).unflatten(1, (group, -1))
    return result, logs


def _differentiate(run: Run, do: Tensor, lse: Tensor, delta: Tensor, need: Need) -> list[Tensor | None]:
    """dq / scale [P, G, T, K], dk log2(e) [P, 1, T, K], dv [P, 1, T, V] and the gradient of G [P, G, T].

    With p_ij = exp2(x_ij - lse_i): dv_j = sum_i p_ij do_i, dx_ij = p_ij (do_i . v_j - delta_i), delta_i = do_i . o_i -
    dlse_i. The subtraction is one more channel of do and v.
    """
    group = run.queries.shape[1]
    dqueries = torch.zeros_like(run.queries) if need.q else None
    dkeys = torch.zeros_like(run.keys[..., : run.width]) if need.k else None
    dvalues = torch.zeros_like(run.values) if need.v else None
    dsums = torch.zeros_like(run.queries[..., 0]) if need.g else None
    values = torch.nn.functional.pad(run.values, (0, 1), value=1.0)
    spare = torch.empty_like(run.buffer)
    for a, b in run.blocks():
        reference = lse[:, :, a:b]
        tiles = run.tiles(a, b, reference)
        if tiles:
            rows = run.extended(a, b, tiles[0].first, reference)
        queries = run.queries[:, :, a:b].flatten(1, 2)
        upstream = torch.cat([do[:, :, a:b], -delta[:, :, a:b]], -1).flatten(1, 2)
        dq = torch.zeros_like(queries) if need.q else None
        for tile in [Tile(a, b, True, run.sums is not None), *tiles]:
            first, last = tile.first, tile.last
            x = run.diagonal(a, b, reference) if first == a else run.scores(rows, a, tile)
            weights = run.weights(x, tile.negligible)
            if need.v:
                dvalues[:, first:last] += torch.bmm(weights.mT, upstream[..., :-1])
            if not (need.q or need.k or need.g):
                continue
            dx = spare[: weights.numel()].view_as(weights)
            torch.bmm(upstream, values[:, first:last].mT, out=dx).mul_(weights)
            if need.q:
                dq.baddbmm_(dx, run.keys[:, first:last, : run.width])
            if need.k:
                dkeys[:, first:last] += torch.bmm(dx.mT, queries)
            if need.g:
                per_head = dx.unflatten(1, (group, -1))
                dsums[..., a:b] += per_head.sum(-1)
                dsums[..., first:last] -= per_head.sum(-2)
        if need.q:
            dqueries[:, :, a:b] = dq.unflatten(1, (group, -1))
    one = [None if x is None else x[:, None] for x in (dkeys, dvalues)]
    return [dqueries, *one, dsums]
