"""Public functions of lightning_attn: linear attention with a constant decay for each head and layer.

    S_t = exp(g_gamma[h]) S_{t-1} + k_t v_t^T,    o_t = scale * S_t^T q_t

Lightning Attention-2 (arXiv 2401.04658), MiniMax-01 (arXiv 2501.08313). The decay is `lightning_decay`'s; decode with
`simple_gla_step_(q, k, v, state, g_gamma=decay)`, which updates the state in place.

`help(fla_ops.lightning_attn)` describes the arguments that the functions share. Every function raises ValueError for
a wrong shape, device or value (a layer that the model has not, too), TypeError for a wrong dtype. Gradients flow to
q, k, v and initial_state; forward-mode AD and double backward raise NotImplementedError.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fla_ops.dispatch import dispatcher
from fla_ops.public import public, steps_or_default

from .forms import FAMILY

Slopes = Literal["linear", "alibi"]
Mode = Literal["auto", "chunk", "fused_chunk", "fused_recurrent"]


@public
def lightning_decay(
    num_heads: int, layer_idx: int, num_layers: int, slopes: Slopes = "linear", *, dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:  # fmt: skip
    """The log decay of each head of one layer, ready to be given as g_gamma. Made on the device, without a copy.

    Args:
        num_heads: the value heads H.
        layer_idx, num_layers: which layer of how many; the first is 0.
        slopes: "linear", -(8 / H) * (1 - layer_idx / num_layers) * h for head h = 0 ... H - 1; or "alibi", MiniMax-01's
            -(2 ** (-8 (h + 1) / H)) * (1 - layer_idx / (num_layers - 1 + 1e-5) + 1e-5).
        dtype, device: of the result; float32 and the default device unless given.

    Returns:
        g_gamma [H], natural-log decays <= 0.

    Raises:
        ValueError: if the layer is not in [0, num_layers), or slopes is no rule.
    """
    device = None if device is None else torch.device(device)
    g_gamma: Tensor = torch.ops.fla.lightning_decay(num_heads, layer_idx, num_layers, slopes, dtype, device)
    return g_gamma


@overload
def chunk_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: Literal[False] = False, cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64, cu_seqlens_cpu: Tensor | None = None, slopes: Slopes = "linear",
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def chunk_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, *, output_final_state: Literal[True], cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64, cu_seqlens_cpu: Tensor | None = None, slopes: Slopes = "linear",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def chunk_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64, cu_seqlens_cpu: Tensor | None = None, slopes: Slopes = "linear",
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@public
def chunk_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64, cu_seqlens_cpu: Tensor | None = None, slopes: Slopes = "linear",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Chunkwise form: a state pass over the chunks, then all chunks in parallel. For training and prefill.

    Args:
        q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, slopes:
            as `help(fla_ops.lightning_attn)` says.
        chunk_size: steps in a chunk, a power of two from 16 to 256. A matter of speed, not of the result.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.
    """
    o, final_state = torch.ops.fla.chunk_lightning_attn(
        q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state, cu_seqlens,
        steps_or_default(chunk_size), cu_seqlens_cpu, slopes,
    )  # fmt: skip
    return o, final_state


@overload
def fused_chunk_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: Literal[False] = False, cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64, cu_seqlens_cpu: Tensor | None = None, slopes: Slopes = "linear",
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def fused_chunk_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, *, output_final_state: Literal[True], cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64, cu_seqlens_cpu: Tensor | None = None, slopes: Slopes = "linear",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def fused_chunk_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64, cu_seqlens_cpu: Tensor | None = None, slopes: Slopes = "linear",
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@public
def fused_chunk_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64, cu_seqlens_cpu: Tensor | None = None, slopes: Slopes = "linear",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Chunkwise form in one pass: each sequence and head walks its chunks with the state at hand. For many heads, or
    little memory.

    Arguments and results are chunk_lightning_attn's.
    """
    o, final_state = torch.ops.fla.fused_chunk_lightning_attn(
        q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state, cu_seqlens,
        steps_or_default(chunk_size), cu_seqlens_cpu, slopes,
    )  # fmt: skip
    return o, final_state


@overload
def fused_recurrent_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: Literal[False] = False, reverse: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, slopes: Slopes = "linear",
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def fused_recurrent_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, *, output_final_state: Literal[True], reverse: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, slopes: Slopes = "linear",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def fused_recurrent_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, reverse: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, slopes: Slopes = "linear",
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@public
def fused_recurrent_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, reverse: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, slopes: Slopes = "linear",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The recurrence, step by step. For short sequences and decoding.

    Args:
        q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, slopes:
            as `help(fla_ops.lightning_attn)` says.
        reverse: run time backwards, S_t = exp(g_gamma) S_{t+1} + k_t v_t^T; the final state is the one after step 0.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.
    """
    o, final_state = torch.ops.fla.fused_recurrent_lightning_attn(
        q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state, reverse, cu_seqlens, cu_seqlens_cpu,
        slopes,
    )  # fmt: skip
    return o, final_state


@overload
def lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: Literal[False] = False, cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64, cu_seqlens_cpu: Tensor | None = None, reverse: bool = False,
    slopes: Slopes = "linear", mode: Mode = "auto",
) -> tuple[Tensor, None]: ...  # fmt: skip
@overload
def lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, *, output_final_state: Literal[True], cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64, cu_seqlens_cpu: Tensor | None = None, reverse: bool = False,
    slopes: Slopes = "linear", mode: Mode = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64, cu_seqlens_cpu: Tensor | None = None, reverse: bool = False,
    slopes: Slopes = "linear", mode: Mode = "auto",
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@dispatcher(FAMILY)
@public
def lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64, cu_seqlens_cpu: Tensor | None = None, reverse: bool = False,
    slopes: Slopes = "linear", mode: Mode = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The form that suits the call: `fla_ops.explain(fla_ops.lightning_attn, ...)` says which, and why not the others.

    Args:
        q, k: [B, T, HK, K]. v: [B, T, H, V], with H a multiple of HK: each query/key head serves H // HK value
            heads. One floating dtype for all three.
        layer_idx, num_layers: which layer of how many; the first is 0.
        slopes: the rule for the decay, "linear" or "alibi" (see lightning_decay).
        scale: factor on q; None means K ** -0.5.
        initial_state: [N, H, K, V] (N = B, or the number of packed sequences), any floating dtype; None means
            zeros.
        output_final_state: whether to return the state after the last step, float32 (float64 for float64
            inputs).
        cu_seqlens: [N + 1] int32 or int64, offsets of sequences packed into a batch of 1; starts at 0, ends at
            T, never falls; a sequence may be empty. On a GPU, where no value can be read back, wrong ones count as
            their running maximum from 0 to T. cu_seqlens_cpu: the same values on the host; results do not depend on it.
        chunk_size: steps in a chunk, a power of two from 16 to 256; None means 64. It changes the speed alone.
        reverse: run time backwards; the final state is the one after step 0.
        mode: "auto", or one of "chunk", "fused_chunk", "fused_recurrent". A named form is used or refused.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.

    Raises:
        ValueError: if mode is no form.
        NotImplementedError: if the named form cannot serve the call, with its reasons.
    """
    o, final_state = torch.ops.fla.lightning_attn(
        q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state, cu_seqlens,
        steps_or_default(chunk_size), cu_seqlens_cpu, reverse, slopes, mode,
    )  # fmt: skip
    return o, final_state
