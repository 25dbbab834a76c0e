"""lightning_attn: every operator composes simple_gla's."""

from __future__ import annotations

from fla_ops.lightning_attn import call

from ._op import register_composite

register_composite(call.DECAY, "fla_ops.lightning_attn.compose:decay")
register_composite(call.CHUNK, "fla_ops.lightning_attn.compose:chunk")
register_composite(call.FUSED_CHUNK, "fla_ops.lightning_attn.compose:fused_chunk")
register_composite(call.RECURRENT, "fla_ops.lightning_attn.compose:fused_recurrent")
register_composite(call.DISPATCHER, "fla_ops.lightning_attn.forms:dispatch")
