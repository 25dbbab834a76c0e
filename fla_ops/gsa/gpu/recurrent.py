"""A recurrence step by step whose state [U, M] has a gate of its own for each memory slot m, and the gradient of these
gates.

    X_t = X_{t-1} diag(exp g_t) + sum_j u_tj w_tj^T

is read over the slots, X_t^T r_t [M], or over the width, X_t r_t [U]. One program carries all of what is summed over
and a block of the rest. The gradient of the state is such a recurrence too: it runs the other way, is written by
every head of a group, and decays on leaving a step instead of on entering it.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu.chunk_index import sequence_bounds
from fla_ops.common.gpu.decay import LOG2E
from fla_ops.common.gpu.tiles import load_rows, nearest, split_program, state_tile, store_back, store_rows

from ..call import Call


@triton.jit
def read_weights(
    r, own, w, t, head, slot,               # [B, T, HR, M], [B, T, HR], [B, T, H, M]; step (int64), reading head, [BM]
    H: tl.constexpr, READERS: tl.constexpr, M: tl.constexpr,
):
    """softmax(r + own w) of one step, [BM]."""
    reader = t * (H * READERS) + head
    x = tl.load(r + reader * M + slot, mask=slot < M, other=float("-inf"))
    writer = t * H + head // READERS
    x += tl.load(own + reader) * tl.load(w + writer * M + slot, mask=slot < M, other=0.0).to(tl.float32)
    weights = tl.exp(x - tl.max(x, 0))
    return weights / tl.sum(weights, 0)


@triton.jit
def put(y, at, value, mask, ADD: tl.constexpr):
    """Store, or add to what is there."""
    if ADD:
        store_back(y + at, value + tl.load(y + at, mask=mask, other=0.0), mask)
    else:
        tl.store(y + at, nearest(value, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def channel_recurrent_kernel(
    u, w, g, r,                             # [B, T, HW, U], [B, T, HW, M], [B, T, H, M], [B, T, HR, U] or [B, T, HR, M]
    initial, final, dfinal,                 # [N, H, U, M] x 3 or TRANSPOSED
    y, before, own, carried,                # [B, T, HR, M] or [B, T, HR, U], x 2; [B, T, HR], [N, H, M]
    cu_seqlens,                             # [N + 1]
    scale, T,                               # on what reads
    H: tl.constexpr, READERS: tl.constexpr, WRITERS: tl.constexpr, U: tl.constexpr, M: tl.constexpr,
    BU: tl.constexpr, BM: tl.constexpr, OVER_SLOTS: tl.constexpr, SOFTMAX: tl.constexpr, ADD: tl.constexpr,
    DECAY_LAST: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
):
    """Writes what each step reads after it is written (y) and before (before), the weight of its own w (own), and
    carried, <X, dX_T> of each slot as the last step finds it. SOFTMAX: own is given, and r is what the softmax adds
    to own w.
    """
    BLOCKS: tl.constexpr = (M + BM - 1) // BM if OVER_SLOTS else (U + BU - 1) // BU
    n, head, block = split_program(BLOCKS, H)
    start, length = sequence_bounds(n, cu_seqlens, T)
    first_width, first_slot = (0, block * BM) if OVER_SLOTS else (block * BU, 0)
    width, slot = first_width + tl.arange(0, BU), first_slot + tl.arange(0, BM)
    state = tl.zeros([BU, BM], tl.float32)
    at, inside = state_tile(n * H + head, first_width, first_slot, U, M, BU, BM, TRANSPOSED)
    if initial is not None:
        state += tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    for i in range(length):
        t = start + (length - 1 - i if REVERSE else i)
        log_decay = tl.load(g + (t * H + head) * M + slot, mask=slot < M, other=0.0).to(tl.float32)
        decay = tl.exp2(log_decay * LOG2E)[None, :]
        if not DECAY_LAST:
            state *= decay
        if carried is not None:
            if i == length - 1:
                product = state * tl.load(dfinal + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(carried + (n * H + head) * M + slot, tl.sum(product, 0), mask=slot < M)
        if before is not None:
            for j in range(READERS):
                reader = t * (H * READERS) + head * READERS + j
                reads = tl.load(r + reader * U + width, mask=width < U, other=0.0).to(tl.float32) * scale
                put(before, reader * M + slot, tl.sum(state * reads[:, None], 0), slot < M, ADD)
                if own is not None:
                    if block == 0:
                        writes = tl.load(u + (t * H + head) * U + width, mask=width < U, other=0.0).to(tl.float32)
                        tl.store(own + reader, tl.sum(reads * writes, 0))
        for j in range(WRITERS):
            writer = t * (H * WRITERS) + head * WRITERS + j
            rows = tl.load(u + writer * U + width, mask=width < U, other=0.0).to(tl.float32)
            columns = tl.load(w + writer * M + slot, mask=slot < M, other=0.0).to(tl.float32)
            state += rows[:, None] * columns[None, :]
        if y is not None:
            for j in range(READERS):
                query = head * READERS + j
                reader = t * (H * READERS) + query
                if OVER_SLOTS:
                    reads = tl.load(r + reader * U + width, mask=width < U, other=0.0).to(tl.float32) * scale
                    put(y, reader * M + slot, tl.sum(state * reads[:, None], 0), slot < M, ADD)
                else:
                    if SOFTMAX:
                        reads = read_weights(r, own, w, t, query, slot, H, READERS, M)
                    else:
                        reads = tl.load(r + reader * M + slot, mask=slot < M, other=0.0).to(tl.float32)
                    put(y, reader * U + width, tl.sum(state * reads[None, :], 1), width < U, ADD)
        if DECAY_LAST:
            state *= decay
    if final is not None:
        tl.store(final + at, state.to(final.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def channel_gate_gradient_kernel(
    reads, s, later, g,                     # [B, T, H, M] x 4
    carried_k, carried_v, dg,               # [N, H, M] x 2, [B, T, H, M]
    cu_seqlens,                             # [N + 1]
    T,
    H: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, REVERSE: tl.constexpr,
):
    """What the final states carry is read by the last step; what it writes there is then not for a gate."""
    n, head, block = split_program((M + BM - 1) // BM, H)
    start, length = sequence_bounds(n, cu_seqlens, T)
    slot = block * BM + tl.arange(0, BM)
    carries = (slot < M) & (length > 0)  # an empty sequence has no last step
    past = tl.zeros([BM], tl.float32)
    if carried_k is not None:
        past += tl.load(carried_k + (n * H + head) * M + slot, mask=carries, other=0.0)
    if carried_v is not None:
        past += tl.load(carried_v + (n * H + head) * M + slot, mask=carries, other=0.0)
    last = 0 if REVERSE else length - 1
    chunks = tl.cdiv(length, BT)
    for c in range(chunks):
        i = c if REVERSE else chunks - 1 - c
        first, steps = start + i * BT, length - i * BT
        t = i * BT + tl.arange(0, BT)[:, None]
        written = load_rows(s + head * M, first, steps, block * BM, H, M, BT, BM).to(tl.float32)
        written *= load_rows(later + head * M, first, steps, block * BM, H, M, BT, BM)
        change = load_rows(reads + head * M, first, steps, block * BM, H, M, BT, BM) - tl.where(t == last, 0.0, written)
        forgets = tl.exp(load_rows(g + head * M, first, steps, block * BM, H, M, BT, BM).to(tl.float32)) == 0.0
        dlog_decay = tl.where(forgets, 0.0, past[None, :] + tl.cumsum(change, 0, reverse=not REVERSE))
        store_rows(dg + head * M, dlog_decay, first, steps, block * BM, H, M, BT, BM)
        past += tl.sum(change, 0)


@dataclass(frozen=True)
class Walk:
    """One walk along all sequences of a call: who writes the state and who reads it, and what is filled where given.

    `backwards` carries the gradient of a state.
    """

    u: Tensor
    w: Tensor
    r: Tensor
    transposed: bool  # the state is [M, U]
    _: KW_ONLY
    initial: Tensor | None = None
    final: Tensor | None = None
    dfinal: Tensor | None = None
    y: Tensor | None = None
    before: Tensor | None = None
    own: Tensor | None = None
    carried: Tensor | None = None
    scale: float = 1.0
    over_slots: bool = False
    softmax: bool = False
    add: bool = False
    backwards: bool = False

    def run(self, c: Call) -> None:
        """Launch it with the gates of a call."""
        _, time, heads, slots = c.g.shape
        width = self.u.shape[3]
        entry = launch.entry("channel_recurrent", self.u, width, slots)
        width_block, slot_block = triton.next_power_of_2(width), triton.next_power_of_2(slots)
        if self.over_slots:
            slot_block = min(slot_block, entry["BLOCK"])
            blocks = triton.cdiv(slots, slot_block)
        else:
            width_block = min(width_block, entry["BLOCK"])
            blocks = triton.cdiv(width, width_block)
        launch.run(
            channel_recurrent_kernel,
            c.sequences * heads * blocks,
            self.u, self.w, c.g, self.r, self.initial, self.final, self.dfinal,
            self.y, self.before, self.own, self.carried, c.cu_seqlens, self.scale, time,
            H=heads, READERS=self.r.shape[2] // heads, WRITERS=self.u.shape[2] // heads, U=width, M=slots,
            BU=width_block, BM=slot_block,
            OVER_SLOTS=self.over_slots, SOFTMAX=self.softmax, ADD=self.add, DECAY_LAST=self.backwards,
            REVERSE=c.reverse != self.backwards, TRANSPOSED=self.transposed, **launch.options(entry),
        )


def gate_gradient(c: Call, reads: Tensor, later: Tensor, carried: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """dg [B, T, H, M]: what a step and those after it read from earlier ones, less what still later ones read from
    them.
    """
    _, time, heads, slots = c.g.shape
    dg = torch.empty_like(c.g)
    entry = launch.entry("channel_gate_gradient", c.s, slots, slots)
    slot_block = launch.block(entry["BM"], slots)
    launch.run(
        channel_gate_gradient_kernel,
        c.sequences * heads * triton.cdiv(slots, slot_block),
        reads, c.s, later, c.g, *carried, dg, c.cu_seqlens, time,
        H=heads, M=slots, BT=entry["BT"], BM=slot_block, REVERSE=c.reverse, **launch.options(entry),
    )
    return dg
