"""lightning_attn: operators that compose simple_gla's with a constant decay."""

from __future__ import annotations

from ._op import register_composite

START = (
    "Tensor q, Tensor k, Tensor v, SymInt layer_idx, SymInt num_layers, float? scale=None, Tensor? initial_state=None, "
    "bool output_final_state=False"
)
RESULT = "(Tensor o, Tensor? final_state)"

register_composite(
    'lightning_decay(SymInt num_heads, SymInt layer_idx, SymInt num_layers, str slopes="linear", '
    "ScalarType? dtype=None, Device? device=None) -> Tensor",
    "fla_ops.lightning_attn.compose:decay",
)
for form in ("chunk", "fused_chunk"):
    register_composite(
        f"{form}_lightning_attn({START}, Tensor? cu_seqlens=None, int chunk_size=64, Tensor? cu_seqlens_cpu=None, "
        f'str slopes="linear") -> {RESULT}',
        f"fla_ops.lightning_attn.compose:{form}",
    )
register_composite(
    f"fused_recurrent_lightning_attn({START}, bool reverse=False, Tensor? cu_seqlens=None, "
    f'Tensor? cu_seqlens_cpu=None, str slopes="linear") -> {RESULT}',
    "fla_ops.lightning_attn.compose:fused_recurrent",
)
register_composite(
    f"lightning_attn({START}, Tensor? cu_seqlens=None, int chunk_size=64, Tensor? cu_seqlens_cpu=None, "
    f'bool reverse=False, str slopes="linear", str mode="auto") -> {RESULT}',
    "fla_ops.lightning_attn.forms:dispatch",
)
