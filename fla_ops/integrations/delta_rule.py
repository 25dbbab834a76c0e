"""The gated delta rule as transformers' models call it: functions with the parameters of theirs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import fla_ops


def chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """torch_chunk_gated_delta_rule; the scale is the default one."""
    return fla_ops.gated_delta_rule(
        query,
        key,
        value,
        g,
        beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=_cu_seqlens(kwargs),
        chunk_size=chunk_size,
    )


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """torch_recurrent_gated_delta_rule; the scale is the default one."""
    return fla_ops.fused_recurrent_gated_delta_rule(
        query,
        key,
        value,
        g,
        beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=_cu_seqlens(kwargs),
    )


def _cu_seqlens(kwargs: dict[str, Any]) -> Tensor | None:
    """The offsets of packed sequences, without which a state would run on from one into the next."""
    cu_seqlens: Tensor | None = kwargs.get("cu_seqlens")
    if cu_seqlens is None and kwargs.get("seq_idx") is not None:
        raise ValueError("packed sequences of the gated delta rule need cu_seq_lens_q, got seq_idx alone")
    return cu_seqlens
