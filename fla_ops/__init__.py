"""Linear-attention operators for PyTorch, registered as `torch.ops.fla.*`.

Every operator has a fake implementation and a gradient, so a model that calls it traces under
`torch.compile(fullgraph=True)` and `torch.export`. Triton kernels run on a GPU, C++ and ATen on a CPU.
"""

from torch._ops import OpOverload

from fla_ops import distributed as distributed  # runs every operator on DTensors
from fla_ops import registrations as registrations  # registers every operator
from fla_ops.attn.api import attn, attn_decoding_one_step, attn_prefill, parallel_attn
from fla_ops.causal_conv.api import causal_conv, causal_conv_step_
from fla_ops.gated_delta_rule.api import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_rule,
    gated_delta_rule_step_,
)
from fla_ops.gsa.api import chunk_gsa, fused_recurrent_gsa, gsa, gsa_advance_, gsa_prefill_, gsa_states, gsa_step_
from fla_ops.lightning_attn.api import (
    chunk_lightning_attn,
    fused_chunk_lightning_attn,
    fused_recurrent_lightning_attn,
    lightning_attn,
    lightning_decay,
)
from fla_ops.linear_attn.api import (
    chunk_linear_attn,
    fused_chunk_linear_attn,
    fused_recurrent_linear_attn,
    linear_attn,
    linear_attn_step_,
    normalize_output,
)
from fla_ops.registrations._inline import decompositions, inlining
from fla_ops.registrations._op import OPERATORS, Operator
from fla_ops.registrations._taken import refuse_calls
from fla_ops.simple_gla.api import (
    chunk_simple_gla,
    fused_chunk_simple_gla,
    fused_recurrent_simple_gla,
    parallel_simple_gla,
    simple_gla,
    simple_gla_advance_,
    simple_gla_prefill_,
    simple_gla_states,
    simple_gla_step_,
)
from fla_ops.ssd.api import ssd, ssd_step_

from .dispatch import explain

__version__ = "0.1.0"


def ops() -> dict[str, Operator]:
    """Every registered operator by name, with its schema, kind and implementations."""
    return dict(OPERATORS)


def sac_ops() -> list[OpOverload]:
    """What selective activation checkpointing should save: the results of every operator with a gradient.

    `torch.utils.checkpoint.create_selective_checkpoint_contexts` takes the list, with other operators added to it.
    """
    return [operator.overload for operator in OPERATORS.values() if operator.kind == "differentiable"]


__all__ = [
    "Operator",
    "__version__",
    "attn",
    "attn_decoding_one_step",
    "attn_prefill",
    "causal_conv",
    "causal_conv_step_",
    "chunk_gated_delta_rule",
    "chunk_gsa",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_simple_gla",
    "decompositions",
    "explain",
    "fused_chunk_lightning_attn",
    "fused_chunk_linear_attn",
    "fused_chunk_simple_gla",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gsa",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_simple_gla",
    "gated_delta_rule",
    "gated_delta_rule_step_",
    "gsa",
    "gsa_advance_",
    "gsa_prefill_",
    "gsa_states",
    "gsa_step_",
    "inlining",
    "lightning_attn",
    "lightning_decay",
    "linear_attn",
    "linear_attn_step_",
    "normalize_output",
    "ops",
    "parallel_attn",
    "parallel_simple_gla",
    "sac_ops",
    "simple_gla",
    "simple_gla_advance_",
    "simple_gla_prefill_",
    "simple_gla_states",
    "simple_gla_step_",
    "ssd",
    "ssd_step_",
]

refuse_calls(globals(), [name for name in __all__ if name != "__version__"])


def __dir__() -> list[str]:
    """What the package is for, without what it is made of."""
    return sorted(__all__)
