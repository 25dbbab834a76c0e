"""fla's activations as ATen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_ops.integrations.fla.norms import linear, wide
from fla_ops.integrations.fla.replacing import replaces


@replaces("fla.modules.activations.ops:sigmoid")
def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@replaces("fla.modules.activations.ops:logsigmoid")
def logsigmoid(x: Tensor, temperature: float = 1.0) -> Tensor:
    return F.logsigmoid(x) / temperature


@replaces("fla.modules.activations.ops:swish")
def swish(x: Tensor) -> Tensor:
    return F.silu(x)


@replaces("fla.modules.activations.ops:sqrelu")
def sqrelu(input: Tensor) -> Tensor:  # noqa: A002    # fla's name
    return wide(input).relu().square().to(input.dtype)


@replaces("fla.modules.activations.ops:fast_gelu_impl")
def gelu(input: Tensor) -> Tensor:  # noqa: A002    # fla's name
    return F.gelu(input, approximate="tanh")


@replaces("fla.modules.activations.ops:bias_gelu_impl")
def bias_gelu(input: Tensor, bias: Tensor) -> Tensor:  # noqa: A002    # fla's name
    return F.gelu(input + bias, approximate="tanh").to(input.dtype)


@replaces("fla.modules.activations.ops:elu_p1")
def elu_p1(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 1, x.clamp(max=0).exp())  # F.elu(x) + 1 would cancel


@replaces("fla.modules.activations.ops:swiglu")
def swiglu(x: Tensor, y: Tensor) -> Tensor:
    return (F.silu(wide(x)) * wide(y)).to(x.dtype)


@replaces("fla.modules.activations.ops:swiglu_linear")
def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(swiglu(x, y), weight, bias)


@replaces("fla.modules.activations.ops:sigmoidglu")
def sigmoidglu(x: Tensor, y: Tensor) -> Tensor:
    return (torch.sigmoid(wide(x)) * wide(y)).to(x.dtype)


@replaces("fla.modules.activations.ops:sigmoidglu_linear")
def sigmoidglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(sigmoidglu(x, y), weight, bias)


@replaces("fla.modules.activations.ops:powglu")
def powglu(x: Tensor, y: Tensor, power: float = 3.0) -> Tensor:
    """sigmoid(x) y times x^(power / (sqrt(x) + 1)) above zero, times x below."""
    gate = wide(x)
    above = gate.masked_fill(gate <= 0, 1.0)  # a root or a power of the rest would have no gradient
    gate = torch.where(gate > 0, above ** (power / (above.sqrt() + 1)), gate) * gate.sigmoid()
    return (gate * wide(y)).to(x.dtype)


@replaces("fla.modules.activations.ops:powglu_linear")
def powglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, power: float = 3.0) -> Tensor:
    return linear(powglu(x, y, power), weight, bias)
