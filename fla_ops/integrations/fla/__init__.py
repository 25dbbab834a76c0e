"""One line for flash-linear-attention: `enable()`, before or after a model is built.

    import fla_ops.integrations.fla as integration

    integration.enable()    # fla's layers and models run on a CPU, and in one graph under torch.compile

What fla's layers call, its modules hold by name: operators, norms, rotary embedding, short convolution, losses. Those
functions are replaced wherever fla holds them, on every device: its operators by fla_ops', the rest by ATen, which
Inductor fuses. `disable()` puts everything back.
"""

from fla_ops.integrations.fla import (  # their functions enter the table of replacements
    activations,
    attention,
    convolution,
    losses,
    mamba2,
    mending,
    norms,
    operators,
    rotary,
)
from fla_ops.integrations.fla.replacing import disable, enable

__all__ = [
    "activations",
    "attention",
    "convolution",
    "disable",
    "enable",
    "losses",
    "mamba2",
    "mending",
    "norms",
    "operators",
    "rotary",
]
