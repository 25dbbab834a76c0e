"""gsa's states on the way, on a CPU and a GPU alike: those before the chunks of the chunk form, which keeps them.

Nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fla_ops.common.cpu.sequences import for_rows
from fla_ops.common.stops import Stops, is_empty, spans_of, stops_of

from . import checks
from .call import CHUNK_FORWARD, Call, Kept, Record, Recorded


def record(c: Record) -> Recorded:
    """o where there are queries, the states after every few steps or where `at` says, and the final ones."""
    checks.eager_record(c)
    call = c.call()
    kept = _chunk_forward(call)
    pairs = ((kept.states_k, kept.final_k), (kept.states_v, kept.final_v))
    if c.at is None:
        owner, chunks, used = _after_every(c, call.chunk_steps)
        found = _before(c, call.chunk_steps, owner, chunks, pairs)
        states = [torch.where(for_rows(used, x), x, 0) for x in found]
    else:
        stops = stops_in(c, call.chunk_steps)
        found = _before(c, call.chunk_steps, stops.owner, stops.chunks.flatten(), pairs)
        states = moved_on(c, stops, found, lambda rest: _chunk_forward(rest)[1:3])
    return Recorded(None if c.q is None else kept.o, *states, kept.final_k, kept.final_v)


def stops_in(c: Record, size: int) -> Stops:
    """The call's stops in chunks of so many steps."""
    return stops_of(c.at, c.cu_seqlens, *c.k.shape[:2], size)


def moved_on(
    c: Record, stops: Stops, states: Sequence[Tensor], finals: Callable[[Call], Sequence[Tensor]]
) -> list[Tensor]:
    """Both states after c.at steps, [N, A, ...], from those [N * A, ...] after the whole chunks before.

    The steps that follow are one chunk each, in which those past the stop change nothing. `finals` runs them.
    """
    if not is_empty(c.k):
        rest = stops.rest.flatten()
        taken = (torch.arange(stops.steps.shape[1], device=rest.device) < rest[:, None])[..., None, None]
        k, v, s, g = (torch.where(taken, stops.cut(x), 0) for x in (c.k, c.v, c.s, c.g))
        state_k, state_v = states
        after = finals(Call(k, k, v, s, g, c.scale, state_k, state_v, True, chunk_size=c.chunk_size))
        states = [torch.where(for_rows(rest > 0, x), y, x) for x, y in zip(states, after, strict=True)]
    inside = stops.inside.flatten()
    return [torch.where(for_rows(inside, x), x, 0).unflatten(0, c.at.shape) for x in states]


def _after_every(c: Record, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of the states: its sequence, how many chunks of it come before, and whether there is such a state."""
    _, lengths = spans_of(c.cu_seqlens, *c.k.shape[:2], c.k.device)
    count = lengths // c.every
    ends = count.cumsum(0)
    row = torch.arange(c.rows, device=c.k.device)
    owner = torch.searchsorted(ends, row, right=True)
    used, owner = owner < len(ends), owner.clamp(max=len(ends) - 1)
    return owner, torch.where(used, (row - (ends - count)[owner] + 1) * (c.every // size), 0), used


def _before(
    c: Record, size: int, owner: Tensor, chunks: Tensor, pairs: tuple[tuple[Tensor, Tensor], ...]
) -> list[Tensor]:
    """Both states after so many whole chunks of some sequences: before a chunk, or else the sequence's last."""
    _, lengths = spans_of(c.cu_seqlens, *c.k.shape[:2], c.k.device)
    count = (lengths + size - 1) // size
    row = (count.cumsum(0) - count)[owner] + chunks
    return [
        torch.cat([states, final])[torch.where(chunks < count[owner], row, len(states) + owner)]
        for states, final in pairs
    ]


def _chunk_forward(c: Call) -> Kept:
    return Kept._make(torch.ops.fla.chunk_gsa_forward(*CHUNK_FORWARD.arguments_of(c)))
