"""gsa on a CPU: the chunk form, one sequence after the other, all chunks of a sequence in batched products.

What the gradient keeps is the argument of the softmax up to level 1 of checkpoint_level, and the states before each
chunk at level 0.
"""

from __future__ import annotations

import torch

from fla_ops.validation import state_dtype

from .. import checks
from ..call import Call, Gradients, Kept, Need, Outputs
from . import abc, passes
from .sequences import Place, alone, empty_gradients, empty_states, places


def chunk_forward(c: Call) -> Kept:
    """The outputs, the final states, and what the gradient keeps."""
    checks.eager(c)
    kept = _empty(c)
    first = 0
    for at in places(c):
        one = alone(c, at)
        x = passes.in_chunks(one)
        found = passes.forward(x, one.initial_k, one.initial_v)
        passes.from_chunks(found.o, x.size, at.of(kept.o))
        if c.output_final_state:
            kept.final_k[at.n], kept.final_v[at.n] = found.final_k, found.final_v
        if kept.earlier is not None:
            passes.from_chunks(found.earlier, x.size, at.of(kept.earlier))
            passes.from_chunks(found.own.unsqueeze(-1).flatten(2, 3), x.size, at.of(kept.own).unsqueeze(-1))
        last = first + len(x.q)
        if kept.states_k is not None:
            kept.states_k[first:last], kept.states_v[first:last] = found.states_k, found.states_v
        first = last
    return kept


def chunk_backward(c: Call, d: Outputs, need: Need, saved: Kept) -> Gradients:
    """The gradient of chunk_forward; what it did not keep is computed again, with the same bits."""
    inside = need.of_gates(c.g)
    gradients = empty_gradients(c, need)
    first = 0
    for at in places(c):
        one = alone(c, at)
        x = passes.in_chunks(one)
        last = first + len(x.q)
        if saved.states_k is None:
            states = x.key_states(one.initial_k)[0], x.value_states(one.initial_v)[0]
        else:  # copied, for how a product rounds may depend on where its operands lie
            states = saved.states_k[first:last].clone(), saved.states_v[first:last].clone()
        first = last
        do, earlier = (
            None if y is None else passes.to_chunks(at.of(y), x.k.shape[1], x.size, x.q.dtype)
            for y in (d.o, saved.earlier)
        )
        dfinal = (None if y is None else y[at.n] for y in (d.final_k, d.final_v))
        kept = saved._replace(earlier=earlier, states_k=states[0], states_v=states[1])
        found = passes.backward(x, Outputs(do, *dfinal), inside, kept)
        if c.g is None and need.s:
            dw, dg = (passes.from_chunks(y, x.size, torch.empty_like(one.g)) for y in (found.s, found.g))
            at.of(gradients.s).copy_(abc.gradient(one.s, one.g, dw, dg, reverse=False))
            found = found._replace(s=None, g=None)
        _fill(gradients, found, at, x.size)
    return gradients


def _fill(gradients: Gradients, found: Gradients, at: Place, size: int) -> None:
    """Put what was found for one sequence in chunks of `size` steps where it belongs."""
    for whole, part in zip(gradients[:5], found[:5], strict=True):
        if whole is not None and part is not None:
            passes.from_chunks(part, size, at.of(whole))
    for whole, part in zip(gradients[5:], found[5:], strict=True):
        if whole is not None:
            whole[at.n] = part


def _empty(c: Call) -> Kept:
    """What chunk_forward returns, to be filled; there may be fewer chunk states than rows for them."""
    o = c.v.new_empty((*c.q.shape[:3], c.v.shape[3]))
    dtype = state_dtype(c.v)
    earlier = own = states_k = states_v = None
    if c.checkpoint_level < 2:
        earlier = c.v.new_empty((*c.q.shape[:3], c.s.shape[3]), dtype=dtype)
        own = c.v.new_empty(c.q.shape[:3], dtype=dtype)
    if c.checkpoint_level < 1:
        states_k, states_v = (c.v.new_zeros((c.chunks, *shape[1:]), dtype=dtype) for shape in c.state_shapes)
    return Kept(o, *empty_states(c, c.output_final_state), earlier, own, states_k, states_v)
