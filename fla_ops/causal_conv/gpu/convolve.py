"""The convolution on a GPU, a tile of steps and channels in each program, in float32.

The gradient goes by two passes over the same tiles: d_t, the gradient of each sum before the activation, with what each
tile adds to the gradients of weight and bias; then dx_t = sum_i weight_i d_{t + W - 1 - i}. The states have kernels of
their own, over sequences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_ops import launch
from fla_ops.common.gpu import chunk_index
from fla_ops.common.gpu.arguments import contiguous, refuse_float64
from fla_ops.common.gpu.chunk_index import ChunkIndex, locate_chunk, sequence_bounds
from fla_ops.common.gpu.tiles import load_rows, nearest, split_program, store_rows

from .. import checks
from ..call import Call, Gradients, Need, Outputs


@triton.jit
def sequence_of(row, chunk_sequence, T, BT: tl.constexpr):
    """The sequence whose chunk lies in this row (int64)."""
    return tl.load(chunk_sequence + row).to(tl.int64) if chunk_sequence is not None else row // tl.cdiv(T, BT)


@triton.jit
def load_state(
    state, n, column, d, mask,          # [N, D, W - 1], int64, [BT], [BD], [BT, BD]
    D: tl.constexpr, W: tl.constexpr,
):
    at = state + n * (D * (W - 1)) + d[None, :].to(tl.int64) * (W - 1) + column[:, None]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_seen(
    x, initial, n, start, length, t, d,     # [time, D], [N, D, W - 1], int64 x 2, int32, [BT], [BD]
    TAP: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
):
    """What steps t of a sequence see through one tap, [BT, BD] in float32."""
    s = t - (W - 1) + TAP
    inside = (t < length)[:, None] & (d < D)[None, :]
    first = start + tl.min(s, 0)
    at = x + first * D + (s - tl.min(s, 0))[:, None] * D + d[None, :]
    tile = tl.load(at, mask=inside & (s >= 0)[:, None], other=0.0).to(tl.float32)
    if (initial is not None) & (TAP < W - 1):
        tile += load_state(initial, n, s + (W - 1), d, inside & (s < 0)[:, None], D, W)
    return tile


@triton.jit
def filter_tile(
    x, weight, bias, initial, n, start, length, t, d,   # as above; [D, W], [D]
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """The sums before the activation, [BT, BD]."""
    sums = tl.zeros([BT, BD], tl.float32)
    if bias is not None:
        sums += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(W):
        taps = tl.load(weight + d * W + tap, mask=d < D, other=0.0).to(tl.float32)
        sums += load_seen(x, initial, n, start, length, t, d, tap, D, W) * taps[None, :]
    return sums


@triton.jit(do_not_specialize=["T", "N"])
def conv_forward_kernel(
    x, weight, bias, initial, o,                # [B, T, D], [D, W], [D], [N, D, W - 1], [B, T, D]
    cu_seqlens, chunk_sequence, chunk_ends,     # [N + 1], [rows], [N]
    T, N,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):
    row, _, block = split_program((D + BD - 1) // BD, 1)
    start, length, c = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    if length > c * BT:
        n = sequence_of(row, chunk_sequence, T, BT)
        t, d = c * BT + tl.arange(0, BT), block * BD + tl.arange(0, BD)
        sums = filter_tile(x, weight, bias, initial, n, start, length, t, d, D, W, BT, BD)
        if SILU:
            sums *= tl.sigmoid(sums)
        store_rows(o, sums, start + c * BT, length - c * BT, block * BD, 1, D, BT, BD)


@triton.jit(do_not_specialize=["T"])
def conv_final_state_kernel(
    x, initial, final,                          # [B, T, D], [N, D, W - 1] x 2
    cu_seqlens, T,                              # [N + 1]
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):
    """The last W - 1 steps of each sequence, those of its initial state included."""
    n, _, block = split_program((D + BD - 1) // BD, 1)
    start, length = sequence_bounds(n, cu_seqlens, T)
    d, column = block * BD + tl.arange(0, BD), tl.arange(0, BW)
    s = length - (W - 1) + column
    inside = (column < W - 1)[:, None] & (d < D)[None, :]
    at = x + start * D + s[:, None].to(tl.int64) * D + d[None, :]
    tile = tl.load(at, mask=inside & (s >= 0)[:, None], other=0.0).to(tl.float32)
    if initial is not None:
        tile += load_state(initial, n, s + (W - 1), d, inside & (s < 0)[:, None], D, W)
    at = final + n * (D * (W - 1)) + d[None, :].to(tl.int64) * (W - 1) + column[:, None]
    tl.store(at, nearest(tile, final.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "N"])
def conv_weight_gradient_kernel(
    x, weight, bias, initial, do,               # [B, T, D], [D, W], [D], [N, D, W - 1], [B, T, D]
    dsums, dweight, dbias,                      # [B, T, D], [rows, W, D], [rows, D]
    cu_seqlens, chunk_sequence, chunk_ends,     # [N + 1], [rows], [N]
    T, N,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):
    """The gradient of the sums, and what each tile adds to those of weight and bias: zeros from an unused row."""
    row, _, block = split_program((D + BD - 1) // BD, 1)
    start, length, c = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    n = sequence_of(row, chunk_sequence, T, BT)
    t, d = c * BT + tl.arange(0, BT), block * BD + tl.arange(0, BD)
    first, steps = start + c * BT, length - c * BT
    arriving = load_rows(do, first, steps, block * BD, 1, D, BT, BD).to(tl.float32)
    if SILU:
        sums = filter_tile(x, weight, bias, initial, n, start, length, t, d, D, W, BT, BD)
        share = tl.sigmoid(sums)
        arriving *= share * (1 + sums * (1 - share))
        if dsums is not None:
            store_rows(dsums, arriving, first, steps, block * BD, 1, D, BT, BD)
    if dweight is not None:
        for tap in tl.static_range(W):
            seen = load_seen(x, initial, n, start, length, t, d, tap, D, W)
            tl.store(dweight + (row * W + tap) * D + d, tl.sum(arriving * seen, 0), mask=d < D)
    if dbias is not None:
        tl.store(dbias + row * D + d, tl.sum(arriving, 0), mask=d < D)


@triton.jit(do_not_specialize=["T", "N"])
def conv_input_gradient_kernel(
    dsums, weight, dfinal, dx,                  # [B, T, D], [D, W], [N, D, W - 1], [B, T, D]
    cu_seqlens, chunk_sequence, chunk_ends,     # [N + 1], [rows], [N]
    T, N,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    row, _, block = split_program((D + BD - 1) // BD, 1)
    start, length, c = locate_chunk(row, cu_seqlens, chunk_sequence, chunk_ends, T, N, BT)
    first, steps = start + c * BT, length - c * BT
    if steps > 0:
        n = sequence_of(row, chunk_sequence, T, BT)
        t, d = c * BT + tl.arange(0, BT), block * BD + tl.arange(0, BD)
        tile = tl.zeros([BT, BD], tl.float32)
        for tap in tl.static_range(W):
            ahead = W - 1 - tap
            taps = tl.load(weight + d * W + tap, mask=d < D, other=0.0).to(tl.float32)
            passed = load_rows(dsums, first + ahead, steps - ahead, block * BD, 1, D, BT, BD).to(tl.float32)
            tile += passed * taps[None, :]
        if (dfinal is not None) & (W > 1):
            column = t + (W - 1) - length
            inside = ((column >= 0) & (t < length))[:, None] & (d < D)[None, :]
            tile += load_state(dfinal, n, column, d, inside, D, W)
        store_rows(dx, tile, first, steps, block * BD, 1, D, BT, BD)


@triton.jit(do_not_specialize=["T"])
def conv_state_gradient_kernel(
    dsums, weight, dfinal, dinitial,            # [B, T, D], [D, W], [N, D, W - 1] x 2
    cu_seqlens, T,                              # [N + 1]
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):
    """Of each step before the first: what those that see it pass on, and the final state where it is still in it."""
    n, _, block = split_program((D + BD - 1) // BD, 1)
    start, length = sequence_bounds(n, cu_seqlens, T)
    d, column = block * BD + tl.arange(0, BD), tl.arange(0, BW)
    inside = (column < W - 1)[:, None] & (d < D)[None, :]
    tile = tl.zeros([BW, BD], tl.float32)
    for tap in tl.static_range(W):
        t = column - tap
        taps = tl.load(weight + d * W + tap, mask=d < D, other=0.0).to(tl.float32)
        at = dsums + start * D + t[:, None].to(tl.int64) * D + d[None, :]
        tile += tl.load(at, mask=inside & ((t >= 0) & (t < length))[:, None], other=0.0).to(tl.float32) * taps[None, :]
    if dfinal is not None:
        tile += load_state(dfinal, n, column - length, d, inside & (column >= length)[:, None], D, W)
    at = dinitial + n * (D * (W - 1)) + d[None, :].to(tl.int64) * (W - 1) + column[:, None]
    tl.store(at, nearest(tile, dinitial.dtype.element_ty), mask=inside)


def forward(c: Call):
    """o [B, T, D] in x's dtype, and the last W - 1 steps in float32 or None."""
    checks.eager(c)
    refuse_float64(c.x, "x")
    c = contiguous(c)
    x = c.x
    o, final = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    entry, index, programs, sizes = _tiles(c, "conv_forward")
    launch.run(
        conv_forward_kernel, programs,
        x, c.weight, c.bias, c.initial_state, o, c.cu_seqlens, index.sequence, index.ends, x.shape[1], c.sequences,
        **sizes, BT=index.size, SILU=c.activation is not None, **launch.options(entry),
    )
    if c.output_final_state:
        final = torch.empty(c.state_shape, dtype=torch.float32, device=x.device)
        _over_sequences(conv_final_state_kernel, c, x, c.initial_state, final)
    return o, final


def backward(c: Call, d: Outputs, need: Need) -> Gradients:
    """The gradients that are needed, each in its input's dtype."""
    c, d = contiguous(c), contiguous(d)
    x, silu = c.x, c.activation is not None
    dsums, dx, dweight, dbias, dinitial = d.o, None, None, None, None
    passes_on = need.x or need.initial_state
    if silu and passes_on:
        dsums = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if need.weight or need.bias or dsums is not d.o:
        entry, index, programs, sizes = _tiles(c, "conv_weight_gradient")
        if need.weight:
            dweight = x.new_empty((index.rows, c.weight.shape[1], x.shape[2]), dtype=torch.float32)
        if need.bias:
            dbias = x.new_empty((index.rows, x.shape[2]), dtype=torch.float32)
        launch.run(
            conv_weight_gradient_kernel, programs,
            x, c.weight, c.bias, c.initial_state, d.o, dsums if silu and passes_on else None, dweight, dbias,
            c.cu_seqlens, index.sequence, index.ends, x.shape[1], c.sequences,
            **sizes, BT=index.size, SILU=silu, **launch.options(entry),
        )
    if need.x:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        entry, index, programs, sizes = _tiles(c, "conv_input_gradient")
        launch.run(
            conv_input_gradient_kernel, programs,
            dsums, c.weight, d.final_state, dx, c.cu_seqlens, index.sequence, index.ends, x.shape[1], c.sequences,
            **sizes, BT=index.size, **launch.options(entry),
        )
    if need.initial_state:
        dinitial = torch.empty(c.state_shape, dtype=c.initial_state.dtype, device=x.device)
        _over_sequences(conv_state_gradient_kernel, c, dsums, c.weight, d.final_state, dinitial)
    return (
        dx,
        None if dweight is None else dweight.sum(0).mT.contiguous().to(c.weight.dtype),
        None if dbias is None else dbias.sum(0).to(c.bias.dtype),
        dinitial,
    )


def _tiles(c: Call, kernel: str) -> tuple[launch.Entry, ChunkIndex, int, dict[str, int]]:
    """A kernel's settings, its chunks of steps, its programs, and its widths."""
    (batch, time, channels), taps = c.x.shape, c.weight.shape[1]
    entry = launch.entry(kernel, c.x, taps, channels)
    index, block = chunk_index.build(batch, time, c.cu_seqlens, entry["BT"]), launch.block(entry["BD"], channels)
    return entry, index, index.rows * triton.cdiv(channels, block), {"D": channels, "W": taps, "BD": block}


def _over_sequences(kernel, c: Call, *tensors: Tensor | None) -> None:
    """Launch a kernel of the states, of which there may be no column."""
    channels, taps = c.weight.shape
    entry = launch.entry("conv_final_state", c.x, taps, channels)
    block = launch.block(entry["BD"], channels)
    if taps > 1:
        launch.run(
            kernel, c.sequences * triton.cdiv(channels, block), *tensors, c.cu_seqlens, c.x.shape[1],
            D=channels, W=taps, BD=block, BW=triton.next_power_of_2(taps - 1), **launch.options(entry),
        )
