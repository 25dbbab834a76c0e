"""The chunkwise form of simple_gla as ATen calls, over any chunk layout; forward and backward.

Inside a chunk of C steps the quadratic form is a masked C x C product; across chunks a state of [K, V] is carried:

    o_i = sum_{j <= i} D_ij (q_i . k_j) v_j + a_i S^T q_i        (q already scaled)
    S'  = d S + sum_j b_j k_j v_j^T

D_ij is the decay from step j to step i, a_i from the chunk's start to i, b_j from j to the chunk's end, d over the
chunk. Tensors are [rows, lanes, HK, G, C, width]: G value heads share each query/key head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fla_ops.common.cpu import decay as decays
from fla_ops.common.cpu.chunks import DenseChunks, Factor
from fla_ops.common.cpu.decay import Decay, Factors

ROWS = 8  # chunks from which the states come from one product
Weights = Decay | Factors | None
Leave = Callable[[int, Tensor, Factor], Tensor]  # which of dq, dk, dv; the gradient in chunks; what it is still times
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32: half-precision inputs are converted once, while they are cut into chunks."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


class Written(NamedTuple):
    """What the steps of a layout write to the state, in chunks; where the decay splits into factors, the keys hold
    theirs.
    """

    keys: Tensor
    values: Tensor
    decay: Weights


def cut(layout: Any, k: Tensor, v: Tensor, g: Tensor | None, g_gamma: Tensor | None) -> Written:
    """Keys, values and decays in chunks."""
    dtype, key_heads = compute_dtype(v), k.shape[2]
    values = layout.split(v, dtype).unflatten(2, (key_heads, -1))
    decay: Weights = None
    if g is not None:
        steps = layout.split(g[..., None], dtype).squeeze(-1).unflatten(2, (key_heads, -1))
        split = decays.factors(steps) if layout.eager and values.shape[3] == 1 else None
        if split is not None:
            return Written(layout.split(k, dtype, split.column.squeeze(3)).unsqueeze(3), values, split)
        decay = decays.per_step(steps)
    elif g_gamma is not None:
        decay = decays.constant(g_gamma.to(dtype).unflatten(0, (key_heads, -1)), layout.size, layout.lengths(v.device))
    return Written(layout.split(k, dtype).unsqueeze(3), values, decay)


def forward(
    layout: Any,
    q: Tensor,
    written: Written,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    state_v_first: bool,
) -> tuple[Tensor, Tensor | None]:
    """o in chunks, [rows, lanes, H, C, V], and the final state, both in the carried dtype."""
    keys, values, decay = written
    queries = _queries(layout, q, written, scale)
    states, final = _states(layout, written, enter_state(initial_state, keys, state_v_first))
    o = _scores(queries, keys, decay) @ values
    _add_product_(o, _reading(queries, decay), states)
    return o.flatten(2, 3), leave_state(final, state_v_first) if output_final_state else None


def backward(
    layout: Any,
    q: Tensor,
    written: Written,
    g: Tensor | None,
    g_gamma: Tensor | None,
    initial_state: Tensor | None,
    do: Tensor,
    dfinal_state: Tensor | None,
    scale: float | None,
    state_v_first: bool,
    output_mask: list[bool],
    leave: Leave,
    states: Tensor | None = None,
) -> Gradients:
    """The gradients that output_mask asks for; dq, dk and dv are what `leave` makes of them.

    `states` are those of chunk_states for the same layout; they are computed here where they are not given.
    """
    need_q, need_k, need_v, need_g, need_gamma, need_state = output_mask
    need_gate = need_g or need_gamma
    keys, values, decay = written
    queries = _queries(layout, q, written, scale)
    do = layout.split(do, values.dtype).unflatten(2, (keys.shape[2], -1))
    dstates = dq = dk = dk_across = dv = dg = dgamma = dstate = None

    if states is None and (need_q or need_gate):
        states, _ = _states(layout, written, enter_state(initial_state, keys, state_v_first))
    if need_k or need_v or need_gate or need_state:
        dfinal = enter_state(dfinal_state, keys, state_v_first)
        dstates, dstate = _dstates(layout, queries, do, decay, dfinal)
    if need_q or need_k or need_gate:
        dscores = _scores(do, values, decay)
        if states is not None:
            dq = _read_by(do @ states.mT, decay)
            _add_product_(dq, dscores, keys)
        if dstates is not None and (need_k or need_gate):
            dk = _written_by(values @ dstates.mT, decay)
            dk_across = _dot(keys, dk) if need_gate else None
            _add_product_(dk, dscores.mT, queries)
    if need_gate:
        dg = _gate_gradient(queries, keys, dq, dk, dk_across, states, dstates, decay)
        dg = layout.join(dg.flatten(2, 3)[..., None], dg.dtype if need_gamma else g.dtype).squeeze(-1)
        if need_gamma:
            dgamma = dg.sum((0, 1)).to(g_gamma.dtype)
    if need_q:
        dq = leave(0, _sum_group(dq), _query_factor(q, decay, scale))
    if need_k:
        dk = leave(1, _sum_group(dk), decay.column.squeeze(3) if isinstance(decay, Factors) else None)
    if need_v:
        dv = _scores(queries, keys, decay).mT @ do
        _add_product_(dv, _writing(keys, decay), dstates)
        dv = leave(2, dv.flatten(2, 3), None)
    return (
        dq if need_q else None,
        dk if need_k else None,
        dv,
        dg if need_g else None,
        dgamma,
        leave_state(dstate, state_v_first).to(initial_state.dtype) if need_state else None,
    )


def joining(layout: Any, *like: Tensor) -> Leave:
    """For `backward`: dq, dk and dv as [B, T, heads, D], each in its input's dtype."""
    return lambda i, x, factor: layout.join(x if factor is None else x * factor, like[i].dtype)


def chunk_states(layout: Any, written: Written, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """What each chunk of the layout reads, and the state [N, H, K, V] after its steps, without the outputs."""
    states, final = _states(layout, written, enter_state(initial_state, written.keys, False))
    return states, leave_state(final, False)


def scale_of(q: Tensor, scale: float | None) -> float:
    """K ** -0.5 unless given."""
    return float(q.shape[3] ** -0.5 if scale is None else scale)


def enter_state(state: Tensor | None, keys: Tensor, state_v_first: bool) -> Tensor | None:
    """[N, H, K, V] (or [N, H, V, K]) to [N, HK, G, K, V] in the dtype of the keys in chunks."""
    if state is None:
        return None
    return (state.mT if state_v_first else state).to(keys.dtype).unflatten(1, (keys.shape[2], -1))


def leave_state(state: Tensor, state_v_first: bool) -> Tensor:
    """The inverse of enter_state, contiguous."""
    state = state.flatten(1, 2)
    return (state.mT if state_v_first else state).contiguous()


def _queries(layout: Any, q: Tensor, written: Written, scale: float | None) -> Tensor:
    """Queries in chunks, scaled; where the decay splits into factors, they hold theirs."""
    factor = _query_factor(q, written.decay, scale)
    return cast("Tensor", layout.split(q, written.values.dtype, factor)).unsqueeze(3)


def _query_factor(q: Tensor, decay: Weights, scale: float | None) -> Factor:
    """What queries are multiplied by while they are cut into chunks."""
    factor = scale_of(q, scale)
    return decay.row.squeeze(3) * factor if isinstance(decay, Factors) else factor


def _states(layout: Any, written: Written, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state that each chunk reads (with Factors: decayed over the chunk), and the final one."""
    keys, values, decay = written
    if isinstance(decay, Factors) and _by_product(layout):
        states = _carried(keys.mT, values, initial, decay.across, reverse=False)
        return states[:-1], states[-1]
    updates = _writing(keys, decay).mT @ values
    if isinstance(decay, Factors):
        return cast("tuple[Tensor, Tensor]", layout.scan(updates, decay.total, initial, decayed=True))
    return cast("tuple[Tensor, Tensor]", layout.scan(updates, None if decay is None else decay.total, initial))


def _dstates(layout: Any, queries: Tensor, do: Tensor, decay: Weights, dfinal: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient that arrives at each chunk's final state, and the initial state's."""
    if isinstance(decay, Factors) and _by_product(layout):
        states = _carried(queries.mT, do, dfinal, decay.across.mT, reverse=True)
        return states[1:], states[0]
    updates = _reading(queries, decay).mT @ do
    if isinstance(decay, Factors):
        return cast("tuple[Tensor, Tensor]", layout.scan(updates, decay.total, dfinal, reverse=True, decayed=True))
    total = None if decay is None else decay.total
    return cast("tuple[Tensor, Tensor]", layout.scan(updates, total, dfinal, reverse=True))


def _by_product(layout: Any) -> bool:
    """Whether one matrix product over the rows is cheaper than a step for each row."""
    return isinstance(layout, DenseChunks) and layout.rows >= ROWS


def _carried(a: Tensor, b: Tensor, edge: Tensor | None, across: Tensor, reverse: bool) -> Tensor:
    """across @ [edge, a @ b over the rows], or with reverse=True across @ [a @ b over the rows, edge]."""
    rows, *lead = b.shape[:-2]
    key, value = a.shape[-2], b.shape[-1]
    steps = b.new_empty((rows + 1, *lead, key, value))
    first, updates = (steps[-1], steps[:-1]) if reverse else (steps[0], steps[1:])
    if edge is None:
        first.zero_()
    else:
        first.copy_(edge)
    torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=updates.flatten(0, -3))
    out = torch.empty_like(steps)
    steps_of_lane, out_of_lane = (x.flatten(-2).flatten(1, -2).transpose(0, 1) for x in (steps, out))
    torch.bmm(across, steps_of_lane, out=out_of_lane)
    return out


def _reading(queries: Tensor, decay: Weights) -> Tensor:
    """Queries as they meet the incoming state."""
    return queries * decay.from_start if isinstance(decay, Decay) else queries


def _writing(keys: Tensor, decay: Weights) -> Tensor:
    """Keys as they enter the outgoing state."""
    return keys * decay.to_end if isinstance(decay, Decay) else keys


def _read_by(dqueries: Tensor, decay: Weights) -> Tensor:
    """The gradient of _reading, in place."""
    return dqueries.mul_(decay.from_start) if isinstance(decay, Decay) else dqueries


def _written_by(dkeys: Tensor, decay: Weights) -> Tensor:
    """The gradient of _writing, in place."""
    return dkeys.mul_(decay.to_end) if isinstance(decay, Decay) else dkeys


def _scores(rows: Tensor, columns: Tensor, decay: Weights) -> Tensor:
    """The causal, decayed products of a chunk: D_ij (rows_i . columns_j)."""
    products = rows @ columns.mT
    if not isinstance(decay, Decay):
        return products.tril_()
    if decay.within.shape[3] == products.shape[3]:
        return products.mul_(decay.within)
    return products * decay.within


def _add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b over broadcast leading dimensions."""
    lead = out.shape[:-2]
    a, b = (x.expand(*lead, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b))
    out.view(-1, *out.shape[-2:]).baddbmm_(a, b)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a * b over the last two dimensions."""
    return (a * b).sum((-2, -1))


def _sum_group(x: Tensor) -> Tensor:
    """[rows, lanes, HK, G, C, K] summed over the value heads of a group."""
    return x.squeeze(3) if x.shape[3] == 1 else x.sum(3)


def _gate_gradient(
    queries: Tensor,
    keys: Tensor,
    dq: Tensor,
    dk: Tensor,
    dk_across: Tensor,
    states: Tensor,
    dstates: Tensor,
    decay: Decay | Factors,
) -> Tensor:
    """The gradient of g, [rows, lanes, HK, G, C], without leaving the chunk.

    With P the running sum of g in the chunk, dP_i = q_i . dq_i - k_i . dk_i; the chunk's end, through b and d, adds
    sum_j k_j . dk_across_j + d <S, dS'> at the last step. dg is the running sum of dP from the end.
    """
    along = (queries * dq).addcmul_(keys, dk, value=-1).sum(-1)
    carried = _dot(states, dstates)
    if isinstance(decay, Decay):
        carried *= decay.total[..., 0, 0]
    along[..., -1] += dk_across + carried
    dg = along.flip(-1).cumsum(-1).flip(-1)
    return dg * decay.alive if isinstance(decay, Decay) else dg
