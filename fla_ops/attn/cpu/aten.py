"""The parallel form of attn on a CPU: blocks of rows with a running softmax, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.validation import scale_of

from .. import checks, decay
from ..decay import REST
from .aten_tiles import LOG2E, Piece, Run, Tile, compute_dtype, pieces, prepare, query_heads, set_query_heads

LARGE = 2.0**40  # a row's weights in one tile may add up to this before they are taken relative to a larger score


def forward(q, k, v, g, scale, window_size, cu_seqlens, chunk_indices, sink_bias, output_rest):
    """o [B, T, HQ, V] in q's dtype, logs of the denominators [B, T, HQ]; if asked, what rounding took from o."""
    checks.launch(q, k, v, g, window_size, cu_seqlens, chunk_indices, sink_bias)
    key_heads = k.shape[2]
    o, lse = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=compute_dtype(q))
    rest = torch.empty_like(o) if output_rest and o.dtype is not lse.dtype else None
    for piece in pieces(q, k, window_size, cu_seqlens):
        run = prepare(q, k, v, g, scale_of(q, scale), window_size, piece)
        outputs, logs = _attend(run)
        if sink_bias is not None:
            with_sink = torch.logaddexp(logs, _sink(sink_bias, piece, run))
            outputs *= (logs - with_sink).exp_()
            logs = with_sink
        set_query_heads(o, piece, key_heads, outputs)
        if rest is not None:
            set_query_heads(rest, piece, key_heads, outputs.sub_(outputs.to(o.dtype)).mul_(REST))
        set_query_heads(lse[..., None], piece, key_heads, logs)
    return o, lse, rest


def backward(q, k, v, g, sink_bias, cu_seqlens, o, lse, rest, do, dlse, scale, window_size, output_mask):
    """The gradients that output_mask asks for (q, k, v, g, sink_bias), each in its input's dtype."""
    dtype, key_heads = compute_dtype(q), k.shape[2]
    grads = [x.new_empty(x.shape) if want else None for want, x in zip(output_mask, (q, k, v, g), strict=False)]
    dsink = q.new_zeros((key_heads, q.shape[2] // key_heads), dtype=torch.float64) if output_mask[4] else None
    for piece in pieces(q, k, window_size, cu_seqlens):
        logs, upstream = (query_heads(x, piece, key_heads, dtype) for x in (lse[..., None], do))
        outputs = query_heads(o, piece, key_heads, dtype)
        if rest is not None:
            outputs.add_(query_heads(rest, piece, key_heads, dtype), alpha=1 / REST)
        delta = (outputs * upstream).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= query_heads(dlse[..., None], piece, key_heads, dtype)
        run = prepare(q, k, v, g, scale_of(q, scale), window_size, piece)
        if dsink is not None:
            share = (_sink(sink_bias, piece, run) - logs).exp_().mul_(delta).sum((2, 3), dtype=torch.float64)
            heads = dsink[piece[2]]
            heads -= share.view(-1, *heads.shape).sum(0)
        if not any(output_mask[:4]):
            continue
        parts = _differentiate(run, upstream, logs * LOG2E, delta, output_mask)
        if parts[0] is not None:
            parts[0].mul_(scale_of(q, scale))
        if parts[1] is not None:
            parts[1].div_(LOG2E)
        if parts[3] is not None:
            steps = query_heads(g[..., None], piece, key_heads, g.dtype).squeeze(-1)
            parts[3] = decay.gradient(parts[3], steps)[..., None]
        for whole, part, one in zip(grads, parts, (False, False, False, True), strict=True):
            if whole is not None:
                set_query_heads(whole[..., None] if one else whole, piece, key_heads, part)
    return *grads, dsink.flatten().to(sink_bias.dtype) if dsink is not None else None


def _sink(sink_bias: Tensor, piece: Piece, run: Run) -> Tensor:
    """The sinks of a piece, [P, G, 1, 1]."""
    pairs, group = run.queries.shape[:2]
    sink = sink_bias.to(run.queries.dtype).view(-1, group)[piece[2]]
    return sink.repeat(pairs // sink.shape[0], 1)[..., None, None]


def _attend(run: Run) -> tuple[Tensor, Tensor]:
    """Outputs [P, G, T, V] and the logarithms of the denominators [P, G, T, 1], without the sinks.

    The diagonal block comes first: every row sees itself, so its largest score there is a reference from which the
    later ones, most of them lower, seldom run away.
    """
    pairs, group, time, _ = run.queries.shape
    outputs = run.queries.new_empty((pairs, group, time, run.values.shape[2]))
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
            weights = run.weights(run.scores(rows, a, tile), tile.faint)
            added = weights.sum(-1, keepdim=True)
            if float(added.amax()) > LARGE:
                x = run.scores(rows, a, tile)
                peak = x.amax(-1, keepdim=True)
                excess = torch.where(peak > 0, peak, 0)
                x.sub_(excess)
                rows[..., -1:] -= excess
                reference += excess
                total *= (-excess).exp2_()
                out *= (-excess).exp2_()
                weights = run.weights(x, tile.faint)
                added = weights.sum(-1, keepdim=True)
            total += added
            out.baddbmm_(weights, run.values[:, tile.first : tile.last])
        outputs[:, :, a:b] = out.div_(total).unflatten(1, (group, -1))
        logs[:, :, a:b] = total.log2_().add_(reference).div_(LOG2E).unflatten(1, (group, -1))
    return outputs, logs


def _differentiate(run: Run, do: Tensor, lse: Tensor, delta: Tensor, output_mask: list[bool]) -> list[Tensor | None]:
    """dq / scale [P, G, T, K], dk log2(e) [P, 1, T, K], dv [P, 1, T, V] and the gradient of G [P, G, T].

    With p_ij = exp2(x_ij - lse_i): dv_j = sum_i p_ij do_i, dx_ij = p_ij (do_i . v_j - delta_i), delta_i = do_i . o_i -
    dlse_i. The subtraction is one more channel of do and v.
    """
    need_q, need_k, need_v, need_g = output_mask[:4]
    group = run.queries.shape[1]
    dqueries = torch.zeros_like(run.queries) if need_q else None
    dkeys = torch.zeros_like(run.keys[..., : run.width]) if need_k else None
    dvalues = torch.zeros_like(run.values) if need_v else None
    dsums = torch.zeros_like(run.queries[..., 0]) if need_g else None
    values = torch.nn.functional.pad(run.values, (0, 1), value=1.0)
    spare = torch.empty_like(run.buffer)
    for a, b in run.blocks():
        reference = lse[:, :, a:b]
        tiles = run.tiles(a, b, reference)
        if tiles:
            rows = run.extended(a, b, tiles[0].first, reference)
        queries = run.queries[:, :, a:b].flatten(1, 2)
        upstream = torch.cat([do[:, :, a:b], -delta[:, :, a:b]], -1).flatten(1, 2)
        dq = torch.zeros_like(queries) if need_q else None
        for tile in [Tile(a, b, True, run.sums is not None), *tiles]:
            first, last = tile.first, tile.last
            x = run.diagonal(a, b, reference) if first == a else run.scores(rows, a, tile)
            weights = run.weights(x, tile.faint)
            if need_v:
                dvalues[:, first:last] += torch.bmm(weights.mT, upstream[..., :-1])
            if not (need_q or need_k or need_g):
                continue
            dx = spare[: weights.numel()].view_as(weights)
            torch.bmm(upstream, values[:, first:last].mT, out=dx).mul_(weights)
            if need_q:
                dq.baddbmm_(dx, run.keys[:, first:last, : run.width])
            if need_k:
                dkeys[:, first:last] += torch.bmm(dx.mT, queries)
            if need_g:
                per_head = dx.unflatten(1, (group, -1))
                dsums[..., a:b] += per_head.sum(-1)
                dsums[..., first:last] -= per_head.sum(-2)
        if need_q:
            dqueries[:, :, a:b] = dq.unflatten(1, (group, -1))
    one = [None if x is None else x[:, None] for x in (dkeys, dvalues)]
    return [dqueries, *one, dsums]
