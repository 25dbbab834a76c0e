"""ssd: both operators compose simple_gla's."""

from __future__ import annotations

from fla_ops.ssd import call

from ._op import register_composite

register_composite(call.SSD, "fla_ops.ssd.compose:forward")
register_composite(call.STEP, "fla_ops.ssd.compose:step")
