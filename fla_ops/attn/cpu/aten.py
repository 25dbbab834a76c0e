"""The parallel form of attn on a CPU: blocks of rows with a running softmax, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_ops.validation import state_dtype

from .. import checks, outputs
from ..call import AFTER, RESIDUAL_SCALE, SAME, Call, Gradients, Need, Outputs, Prefill, PrefillNeed
from . import decay
from .aten_tiles import LOG2E, NEVER, Piece, Run, copied, of_heads, pieces, prepare, query_heads

LARGE = 2.0**40  # a row's weights in one tile may add up to this before they are taken relative to a larger score


def forward(c: Call) -> Outputs:
    """Every row's output and the logarithm of its denominator, and o's rounding residual if that is asked for."""
    checks.eager(c)
    return _forward(c)


def prefill(c: Prefill) -> Outputs:
    """The same for queries at later steps than most of their keys."""
    checks.eager_prefill(c)
    return _forward(c)


def _forward(c: Call | Prefill) -> Outputs:
    every_row_sees = c.place == SAME and c.window_size != 0
    o, lse, rest = outputs.empty(c) if every_row_sees else outputs.without_keys(c)
    key_heads = c.k.shape[2]
    for piece in pieces(c):
        if piece.is_blank:
            continue
        out, logs = _attend(prepare(c, piece))
        if c.sink_bias is not None:
            with_sink = torch.logaddexp(logs, _sinks(c, piece))
            out *= (logs - _finite(with_sink)).exp_()
            logs = with_sink
        query_heads(o, piece, piece.rows, key_heads).copy_(out)
        if rest is not None:
            out.sub_(out.to(o.dtype)).mul_(RESIDUAL_SCALE)
            query_heads(rest, piece, piece.rows, key_heads).copy_(out)
        of_heads(lse, piece, piece.rows, key_heads).copy_(logs.squeeze(-1))
    return Outputs(o, lse, rest)


def backward(c: Call | Prefill, d: Outputs, need: Need | PrefillNeed, saved: Outputs) -> Gradients:
    """The gradients that are needed, each in its input's dtype."""
    if c.window_size == 0:
        return outputs.gradients_without_keys(c, d, need)
    dtype, key_heads = state_dtype(c.q), c.k.shape[2]
    grads = {name: torch.zeros_like(x) for name, x in zip(need._fields, _inputs(c, need), strict=True) if x is not None}
    dsink = c.q.new_zeros((key_heads, c.q.shape[2] // key_heads), dtype=torch.float64)
    for piece in pieces(c):
        rows = piece.rows
        logs = copied(query_heads(saved.lse[..., None], piece, rows, key_heads), dtype)
        upstream, out = (copied(query_heads(x, piece, rows, key_heads), dtype) for x in (d.o, saved.o))
        if saved.rest is not None:
            out.add_(query_heads(saved.rest, piece, rows, key_heads), alpha=1 / RESIDUAL_SCALE)
        delta = (out * upstream).sum(-1, keepdim=True)
        if d.lse is not None:
            delta -= query_heads(d.lse[..., None], piece, rows, key_heads)
        logs = _finite(logs)
        if need.sink_bias:
            share = (_sinks(c, piece) - logs).exp_().mul_(delta)
            dsink[piece.heads] -= share.sum((2, 3), dtype=torch.float64)
        if piece.is_blank or not any(name != "sink_bias" for name in grads):
            continue
        found = _differentiate(prepare(c, piece), upstream, logs * LOG2E, delta, need)
        if need.q:
            found["q"].mul_(c.factor)
        if need.k:
            found["k"].div_(LOG2E)
        if need.g:
            gates = of_heads(c.g, piece, piece.columns, key_heads)
            found["g"] = decay.gradient(found["g"], gates, c.place == AFTER)
        for name, part in found.items():
            whole, steps = grads[name], rows if name in ("q", "decay") else piece.columns
            of = of_heads if whole.dim() == 3 else query_heads
            of(whole, piece, steps, key_heads).copy_(part)
    if need.sink_bias:
        grads["sink_bias"] = dsink.flatten().to(c.sink_bias.dtype)
    return tuple(grads.get(name) for name in need._fields)


def _inputs(c: Call | Prefill, need: Need | PrefillNeed) -> tuple[Tensor | None, ...]:
    """Those whose gradients are needed."""
    return tuple(getattr(c, name) if wanted else None for name, wanted in zip(need._fields, need, strict=True))


def _sinks(c: Call | Prefill, piece: Piece) -> Tensor:
    """The sinks of a piece, [P, G, 1, 1]."""
    return c.sink_bias.to(state_dtype(c.q)).view(c.k.shape[2], -1)[piece.heads, :, None, None]


def _finite(logs: Tensor) -> Tensor:
    """Zero in place of the logarithm of nothing, beside which exponents are -inf too."""
    return logs.masked_fill(logs == NEVER, 0.0)


def _attend(run: Run) -> tuple[Tensor, Tensor]:
    """Outputs [P, G, T, V] and the logarithms of the denominators [P, G, T, 1], without the sinks.

    The diagonal block comes first: every row sees itself, so its largest score there is a reference from which the
    later ones, most of them lower, seldom run away.
    """
    pairs, group, time, _ = run.queries.shape
    result = run.queries.new_empty((pairs, group, time, run.values.shape[2]))
    logs = run.queries.new_empty((pairs, group, time, 1))
    for a, b in run.blocks():
        nearest = run.nearest(a, b)
        x = run.near(a, b, None)
        reference = _finite(x.amax(-1, keepdim=True))
        weights = run.weights(x.sub_(reference), nearest.negligible)
        total = weights.sum(-1, keepdim=True)
        out = torch.bmm(weights, run.values[:, nearest.first : nearest.last])
        tiles = run.tiles(a, b, reference.unflatten(1, (group, -1)))
        if tiles:
            rows = run.extended(a, b, tiles[0].first, nearest.first, reference.unflatten(1, (group, -1)))
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
        found = run.of_rows(a, b)
        result[:, :, found] = out.div_(total.masked_fill(total == 0, 1.0)).unflatten(1, (group, -1))
        logs[:, :, found] = total.log2_().add_(reference).div_(LOG2E).unflatten(1, (group, -1))
    return result, logs


def _differentiate(run: Run, do: Tensor, lse: Tensor, delta: Tensor, need: Need | PrefillNeed) -> dict[str, Tensor]:
    """dq / scale [P, G, T, K], dk log2(e) [P, 1, TK, K], dv [P, 1, TK, V], and for g the gradient of G [P, G, TK].

    With p_ij = exp2(x_ij - lse_i): dv_j = sum_i p_ij do_i, dx_ij = p_ij (do_i . v_j - delta_i), delta_i = do_i . o_i -
    dlse_i. The subtraction is one more channel of do and v.
    """
    group = run.queries.shape[1]
    found = {
        "q": torch.zeros_like(run.queries) if need.q else None,
        "k": torch.zeros_like(run.keys[..., : run.width]) if need.k else None,
        "v": torch.zeros_like(run.values) if need.v else None,
        "g": run.queries.new_zeros((*run.queries.shape[:2], run.count)) if need.g else None,
        "decay": torch.zeros_like(run.queries[..., 0]) if need.decay else None,
    }
    values = torch.nn.functional.pad(run.values, (0, 1), value=1.0)
    spare = torch.empty_like(run.buffer)
    if run.softcap is not None:
        run.slopes = torch.empty_like(run.buffer)
    for a, b in run.blocks():
        seen = run.of_rows(a, b)
        reference = lse[:, :, seen]
        nearest, tiles = run.nearest(a, b), run.tiles(a, b, reference)
        if tiles:
            rows = run.extended(a, b, tiles[0].first, nearest.first, reference)
        queries = run.queries[:, :, seen].flatten(1, 2)
        upstream = torch.cat([do[:, :, seen], -delta[:, :, seen]], -1).flatten(1, 2)
        dq = torch.zeros_like(queries) if need.q else None
        for tile in [nearest, *tiles]:
            first, last = tile.first, tile.last
            x = run.near(a, b, reference) if tile is nearest else run.scores(rows, a, tile)
            weights = run.weights(x, tile.negligible)
            if need.v:
                found["v"][:, first:last] += torch.bmm(weights.mT, upstream[..., :-1])
            if not (need.q or need.k or need.g or need.decay):
                continue
            dx = spare[: weights.numel()].view_as(weights)
            torch.bmm(upstream, values[:, first:last].mT, out=dx).mul_(weights)
            if need.g or need.decay:
                _add_sums(run, found, dx.unflatten(1, (group, -1)), (seen, slice(a, b), slice(first, last)))
            if run.softcap is not None:
                dx *= run.slopes_of(dx)
            if need.q:
                dq.baddbmm_(dx, run.keys[:, first:last, : run.width])
            if need.k:
                found["k"][:, first:last] += torch.bmm(dx.mT, queries)
        if need.q:
            found["q"][:, :, seen] = dq.unflatten(1, (group, -1))
    for name in ("k", "v"):
        found[name] = None if found[name] is None else found[name][:, None]
    return {name: x for name, x in found.items() if x is not None}


def _add_sums(run: Run, found: dict[str, Tensor | None], dx: Tensor, spans: tuple[slice, slice, slice]) -> None:
    """Sums over rows and columns of dx [P, G, rows, columns], to the gradients of what decays: `spans` are those of the
    rows in the piece, of the rows among the columns, and of the columns.
    """
    rows, steps, columns = spans
    if found["decay"] is not None:
        found["decay"][..., rows] += dx.sum(-1)
    if found["g"] is not None:
        if not run.after:
            found["g"][..., steps] += dx.sum(-1)
        found["g"][..., columns] -= dx.sum(-2)
