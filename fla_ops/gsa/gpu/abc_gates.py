"""A running logsumexp over time as gates: with z = logcumsumexp(s), weights w_t = exp(s_t - z_t) and log decays g_t =
z_{t-1} - z_t <= 0, g = 0 at a sequence's first step. With reverse=True time runs backwards.

Gradient: dz_t = dg_{t+1} - dg_t - w_t dw_t and ds_u = w_u (dw_u + W_u) with W_u = dz_u + exp(g_{u+1}) W_{u+1}, a
recurrence whose decays are at most 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.chunk_index import sequence_bounds
from fla_ops.common.gpu.tiles import load_rows, split_program, store_rows

from ..call import Call, Gradients, Need


@triton.jit
def log_add(a, b):
    """log(exp(a) + exp(b)); -inf is no term."""
    larger = tl.maximum(a, b)
    finite = tl.where(larger == float("-inf"), 0.0, larger)
    return finite + tl.log(tl.exp(a - finite) + tl.exp(b - finite))


@triton.jit
def compose(decay, added, next_decay, next_added):
    """x <- decay x + added, then x <- next_decay x + next_added, as one."""
    return decay * next_decay, added * next_decay + next_added


@triton.jit
def load_at(
    x, start,                               # at one head of [time, H, M]; first step (int64)
    t, inside, slot,                        # [BT, 1] steps, which of them to read
    H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
):
    """[BT, BM] in float32, zero elsewhere."""
    column = slot + tl.arange(0, BM)[None, :]
    return tl.load(x + (start + t) * (H * M) + column, mask=inside & (column < M), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def slot_gates_kernel(
    s, weights, g,                          # [B, T, H, M] x 3
    cu_seqlens,                             # [N + 1]
    T,
    H: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, REVERSE: tl.constexpr,
):
    n, head, block = split_program((M + BM - 1) // BM, H)
    start, length = sequence_bounds(n, cu_seqlens, T)
    s += head * M
    weights += head * M
    g += head * M
    slot = block * BM
    before = tl.full([BM], float("-inf"), tl.float32)  # z of the steps before the chunk
    chunks = tl.cdiv(length, BT)
    for c in range(chunks):
        i = chunks - 1 - c if REVERSE else c
        first, steps = start + i * BT, length - i * BT
        t = i * BT + tl.arange(0, BT)[:, None]
        terms = tl.where(t < length, load_at(s, start, t, t < length, slot, H, M, BM), float("-inf"))
        # the same, one step later: whose running sum is that of the step before
        older = t + 1 if REVERSE else t - 1
        inside = (older >= i * BT) & (older < tl.minimum(length, i * BT + BT))
        older_terms = tl.where(inside, load_at(s, start, older, inside, slot, H, M, BM), float("-inf"))
        carried = tl.broadcast_to(before[None, :], [BT, BM])
        z = log_add(tl.associative_scan(terms, 0, log_add, reverse=REVERSE), carried)
        older_z = log_add(tl.associative_scan(older_terms, 0, log_add, reverse=REVERSE), carried)
        fading = tl.where(older_z == float("-inf"), 0.0, older_z - z)
        store_rows(weights, tl.exp(terms - z), first, steps, slot, H, M, BT, BM)
        store_rows(g, fading, first, steps, slot, H, M, BT, BM)
        before = tl.max(z, 0)


@triton.jit(do_not_specialize=["T"])
def slot_gates_gradient_kernel(
    weights, g, dweights, dg, ds,           # [B, T, H, M] x 5
    cu_seqlens,                             # [N + 1]
    T,
    H: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, REVERSE: tl.constexpr,
):
    n, head, block = split_program((M + BM - 1) // BM, H)
    start, length = sequence_bounds(n, cu_seqlens, T)
    weights += head * M
    g += head * M
    dweights += head * M
    dg += head * M
    ds += head * M
    slot = block * BM
    past = tl.zeros([BM], tl.float32)  # W of the step after the chunk
    chunks = tl.cdiv(length, BT)
    row = tl.arange(0, BT)[:, None]
    for c in range(chunks):
        i = c if REVERSE else chunks - 1 - c
        first, steps = start + i * BT, length - i * BT
        t = i * BT + row
        newer = t - 1 if REVERSE else t + 1
        follows = (t < length) & (newer >= 0) & (newer < length)
        leads = length - 1 if REVERSE else 0
        weight = load_rows(weights, first, steps, slot, H, M, BT, BM)
        dweight = load_rows(dweights, first, steps, slot, H, M, BT, BM)
        dz = load_at(dg, start, newer, follows, slot, H, M, BM) - weight * dweight
        dz -= load_at(dg, start, t, (t < length) & (t != leads), slot, H, M, BM)
        decay = tl.exp(load_at(g, start, newer, follows, slot, H, M, BM))
        decay = tl.where(t < length, tl.where(follows, decay, 0.0), 1.0)
        total_decay, sums = tl.associative_scan((decay, dz), 0, compose, reverse=not REVERSE)
        sums += total_decay * past[None, :]
        store_rows(ds, weight * (dweight + sums), first, steps, slot, H, M, BT, BM)
        past = tl.sum(tl.where(row == (BT - 1 if REVERSE else 0), sums, 0.0), 0)


def with_gates(c: Call) -> Call:
    """The call itself, or where it has no g, one with the weights and log decays of ABC in float32 as its s and g."""
    if c.g is not None:
        return c
    weights, g = (torch.empty(c.s.shape, dtype=torch.float32, device=c.s.device) for _ in range(2))
    _run("slot_gates", slot_gates_kernel, c, c.s, weights, g)
    return c._replace(s=weights, g=g)


def of_inputs(given: Call, c: Call, need: Need, found: Gradients) -> Gradients:
    """The gradients of the `given` call's inputs, from those of the call `c` that `with_gates` made of it."""
    if given.g is not None or not need.s:
        return found
    ds = torch.empty_like(given.s)
    _run("slot_gates_gradient", slot_gates_gradient_kernel, c, c.s, c.g, found.s, found.g, ds)
    return found._replace(s=ds, g=None)


def _run(name: str, kernel: object, c: Call, *tensors: Tensor) -> None:
    """Launch a kernel over the sequences, heads and blocks of memory slots of a call."""
    heads, slots = c.s.shape[2:]
    entry = launch.entry(name, tensors[0], slots, slots)
    slot_block = launch.block(entry["BM"], slots)
    launch.run(
        kernel,
        c.sequences * heads * triton.cdiv(slots, slot_block),
        *tensors, c.cu_seqlens, c.s.shape[1],
        H=heads, M=slots, BT=entry["BT"], BM=slot_block, REVERSE=bool(c.reverse), **launch.options(entry),
    )
