"""States after any number of steps, from those after whole chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fla_ops.common.stops import is_empty, stops_of

from .call import Record, Recorded


def stopped(c: Record, walk: Callable[[Record], Recorded]) -> Recorded:
    """What `walk` records, with the states after c.at steps: those after whole chunks, moved on by the steps since.

    Rows of `states` are [N, A, H, K, V]; the others are as without `at`.
    """
    found = walk(c._replace(at=None, every=c.chunk_size))
    batch, time = c.k.shape[:2]
    stops = stops_of(c.at, c.cu_seqlens, batch, time, c.chunk_size)
    sequences, count = c.at.shape
    initial = c.initial_state
    if initial is None:
        initial = found.final_state.new_zeros(found.final_state.shape)
    whole = stops.lengths // c.chunk_size
    before = torch.where(stops.chunks == 0, torch.arange(sequences, device=c.at.device)[:, None], sequences - 1)
    before = before + torch.where(stops.chunks == 0, 0, (whole.cumsum(0) - whole)[:, None] + stops.chunks)
    states = torch.cat([initial.to(found.states.dtype), found.states])[before.flatten()]
    if not is_empty(c.k):
        k, v, g = (stops.cut(x) for x in (c.k, c.v, c.g))
        torch.ops.fla.simple_gla_advance_(k, v, states, stops.rest.flatten(), g, c.g_gamma, None, c.state_v_first)
    states = torch.where(stops.inside[:, :, None, None, None], states.unflatten(0, (sequences, count)), 0)
    return found._replace(states=states)
