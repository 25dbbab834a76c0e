"""Softmax attention for transformers' AttentionInterface: causal, with windows, sinks, padding and packing.

The mask of transformers is a matrix; here it becomes a decay and a window. Left padding and packed sequences are steps
that forget (a decay of -inf is an exact reset), so no row is unpadded and no offset is read back. What has no such form
is refused by name: a soft cap, dropout, attention that looks ahead, padding between tokens, a static cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fla_ops


class CausalMask(NamedTuple):
    """What stands for a causal mask: decay [B, T] of the keys, 0 or -inf (None: no resets), and the window."""

    decay: Tensor | None
    window: int | None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> CausalMask:
    """A mask function of transformers. attention_mask is [B, steps], false at padding.

    Raises:
        NotImplementedError: if no decay and window say the same as mask_function.
    """
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise NotImplementedError(
            "fla_ops attends from the newest steps to all cached ones: a static cache, or keys beyond the last query, "
            f"need another attention implementation; got queries from {q_offset} on, {q_length} of them, and keys "
            f"from {kv_offset} on, {kv_length} of them"
        )
    if use_vmap:
        raise NotImplementedError(
            "fla_ops takes causal masks, windows, padding and packing, got a mask function that the model overlays"
        )
    starts = _padding_ends(attention_mask, kv_offset, kv_length)
    changes = _sequences_start(mask_function, batch_size, kv_length, kv_offset, device)
    if changes is not None:
        starts = changes if starts is None else starts | changes
    # Compiled code cannot look at the values.
    if starts is None or not (torch.compiler.is_compiling() or bool(starts.any())):
        return CausalMask(None, local_size)
    return CausalMask(torch.zeros(starts.shape, device=starts.device).masked_fill(starts, -math.inf), local_size)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CausalMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [B, HQ, S, K], key and value [B, H, T, K] to [B, S, HQ, K].

    Raises:
        NotImplementedError: for what the operators do not compute.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    refused = {
        "dropout": dropout,
        "attention that is not causal": not causal,
        "a mask that is not made by fla_ops": attention_mask is not None and not isinstance(attention_mask, CausalMask),
    } | {name: kwargs.get(name) is not None for name in ("softcap", "position_bias", "head_mask", "cache")}
    if any(refused.values()):
        raise NotImplementedError(
            f"{type(module).__name__} asks for {', '.join(name for name, asked in refused.items() if asked)}, which "
            "fla_ops does not serve: set another attn_implementation"
        )
    decay, window = (None, sliding_window) if attention_mask is None else attention_mask
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    g = None if decay is None else decay[..., None].expand(-1, -1, q.shape[2])
    steps, time = q.shape[1], k.shape[1]
    if steps == time:
        return fla_ops.parallel_attn(q, k, v, g, scaling, window, sink_bias=s_aux), None
    inputs = (q, k, v) if s_aux is None else (q, k, v, s_aux)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if steps == 1 and not recorded and query.device.type != "cpu":
        return _newest(q, k, v, g, scaling, window, s_aux), None
    return last_rows(query, key, value, decay, scaling, window, s_aux), None


def _padding_ends(attention_mask: Tensor | None, kv_offset: int, kv_length: int) -> Tensor | None:
    """[B, T], true where padding ends and a sequence starts."""
    if attention_mask is None:
        return None
    if not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    real = attention_mask.bool()[:, kv_offset : kv_offset + kv_length]
    starts = real & ~F.pad(real, (1, 0))[:, :-1]
    _require((starts.sum(-1) <= 1).all(), "fla_ops takes padding before or after the tokens of a row, not between them")
    return starts


def _sequences_start(
    mask_function: Callable[..., Any] | None, batch: int, time: int, offset: int, device: torch.device | str
) -> Tensor | None:
    """[B, T], true where a step does not see the step before it: there a packed sequence or a chunk begins.

    A causal mask function is of this kind if no step sees the next one.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is None or mask_function is causal_mask_function:
        return None
    rows = torch.arange(batch, device=device)[:, None]
    steps = torch.arange(time, device=device)[None] + offset
    head = torch.zeros((), dtype=torch.long, device=device)
    ahead = mask_function(rows, head, steps[:, :-1], steps[:, 1:])
    _require(~ahead.any(), "fla_ops takes causal masks, got a mask function by which a step sees the next one")
    sees = mask_function(rows, head, steps[:, 1:], steps[:, :-1])
    return F.pad(~sees.expand(batch, -1), (1, 0))


def _require(condition: Tensor, message: str) -> None:
    """Raise NotImplementedError, or where values cannot be looked at trip an assertion on the device."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise NotImplementedError(message)


def _newest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    window: int | None,
    sink: Tensor | None,
) -> Tensor:
    """q [B, 1, HQ, K], the newest step of each row, against k and v [B, T, H, K]."""
    offsets = k.shape[1] * torch.arange(k.shape[0] + 1, device=k.device)
    k, v = (x.flatten(0, 1)[None] for x in (k, v))
    g = None if g is None else g.flatten(0, 1)[None]
    o = fla_ops.attn_decoding_one_step(q.transpose(0, 1), k, v, g, scale, offsets, sink_bias=sink, window_size=window)
    return o.transpose(0, 1)


def last_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    scale: float | None,
    window: int | None,
    sink: Tensor | None,
) -> Tensor:
    """The last S of T rows as dense products, which read the cache [B, H, T, K] as it lies: a prompt in pieces, for
    which there is no operator, and steps on a CPU, where the operator for them would copy it.
    """
    batch, heads, steps, width = query.shape
    if window is not None:  # what no row sees is cut off
        key, value = (x[:, :, 1 - window - steps :] for x in (key, value))
        decay = None if decay is None else decay[:, 1 - window - steps :]
    time = key.shape[2]
    rows = query.reshape(batch, key.shape[1], -1, width)  # the query heads of one key head, and their steps
    scores = (rows @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * (
        width**-0.5 if scale is None else scale
    )
    scores = scores.view(batch, heads, steps, time)
    seen = _seen(steps, time, decay, window, key.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    if sink is not None:
        extra = sink.to(scores.dtype).view(1, heads, 1, 1).expand(batch, -1, steps, -1)
        scores = torch.cat([scores, extra], -1)
    weights = scores.softmax(-1)[..., :time].to(value.dtype)
    o: Tensor = weights.reshape(batch, key.shape[1], -1, time) @ value
    return o.view(batch, heads, steps, value.shape[-1]).transpose(1, 2)


def _seen(steps: int, time: int, decay: Tensor | None, window: int | None, device: torch.device) -> Tensor | None:
    """[B or 1, 1, S, T], which keys each of the last rows sees; None where it is all of them."""
    if steps == 1 and decay is None:  # the window was cut out
        return None
    rows = torch.arange(time - steps, time, device=device)[:, None]
    columns = torch.arange(time, device=device)
    seen = columns <= rows
    if window is not None:
        seen = seen & (columns > rows - window)
    if decay is None:
        return seen[None, None]
    resets = decay.isinf().cumsum(-1)  # a row sees what lies between the last reset up to it and itself
    return (seen & (resets[:, -steps:, None] == resets[:, None]))[:, None]
