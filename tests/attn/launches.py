"""The launches of attn's kernels that take the most registers and shared memory, for each of its kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fla_ops.attn import outputs
from fla_ops.attn.call import DECODING, Call, Need, Prefill, PrefillNeed
from fla_ops.attn.gpu import decoding, parallel, parallel_backward

SIZES = {"batch": 1, "time": 256, "query_heads": 4, "heads": 2}  # widths decide, and whether a size divides by 16
WINDOW = 100


def call(dtype: torch.dtype, key_width: int, value_width: int) -> Call:
    """Arguments of one call, on the host."""
    batch, time, query_heads, heads = SIZES.values()
    return Call(
        q=torch.zeros(batch, time, query_heads, key_width, dtype=dtype),
        k=torch.zeros(batch, time, heads, key_width, dtype=dtype),
        v=torch.zeros(batch, time, heads, value_width, dtype=dtype),
        g=torch.zeros(batch, time, query_heads),
        window_size=WINDOW,
        sink_bias=torch.zeros(query_heads),
        output_rest=True,
    )


def forward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    parallel.forward(call(dtype, key_width, value_width))


def backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    saved = outputs.empty(c)
    parallel_backward.backward(c, saved._replace(rest=None), Need(True, True, True, True, True), saved)


def rectangular(dtype: torch.dtype, key_width: int, value_width: int) -> Prefill:
    """A call of the rectangular form with capped scores, its queries after all keys."""
    c = call(dtype, key_width, value_width)
    kept = {name: getattr(c, name) for name in ("q", "k", "v", "g", "window_size", "sink_bias", "output_rest")}
    return Prefill(**kept, softcap=30.0, gap=3, decay=torch.zeros(c.g.shape))


def prefill(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    parallel.prefill(rectangular(dtype, key_width, value_width)._replace(gap=None, decay=None))


def after(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    parallel.prefill(rectangular(dtype, key_width, value_width))


def prefill_backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    _differentiate(rectangular(dtype, key_width, value_width)._replace(gap=None, decay=None))


def after_backward(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    _differentiate(rectangular(dtype, key_width, value_width))


def _differentiate(c: Prefill) -> None:
    saved = outputs.empty(c)
    need = PrefillNeed(True, True, True, True, True, c.decay is not None)
    parallel_backward.backward(c, saved._replace(rest=None), need, saved)


def step(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    c = call(dtype, key_width, value_width)
    c = c._replace(q=c.q[:, :1], cu_seqlens=torch.tensor([0, SIZES["time"]]))
    decoding.one_step(DECODING.call_of(DECODING.arguments_of(c)))


CALLS: dict[str, list[Callable[[torch.dtype, int, int], None]]] = {
    "attn_forward": [forward, prefill, after],
    "attn_query_gradient": [backward, prefill_backward, after_backward],
    "attn_key_gradient": [backward, prefill_backward, after_backward],
    "attn_decay_sums": [backward],
    "attn_decay_gradient": [backward, after_backward],
    "attn_row_terms": [backward],
    "attn_decoding": [step],
    "attn_join": [step],
}
