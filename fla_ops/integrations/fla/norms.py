"""fla's norms as ATen: the mean and the root in float32 (float64 for float64 inputs), the output in x's dtype.

They are written out: F.rms_norm and F.layer_norm ask whether a batch is empty, which a trace cannot say of a batch that
was unpadded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_ops.integrations.fla.replacing import replaces


def wide(x: Tensor) -> Tensor:
    """The tensor in the dtype that sums are taken in."""
    return x if x.dtype == torch.float64 else x.float()


def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool = False, groups: int = 1
) -> Tensor:
    """x [..., D] over each of its groups, weight and bias [D]. The result is not cast back."""
    x = wide(x).unflatten(-1, (groups, -1))
    x = x if rms else x - x.mean(-1, keepdim=True)
    x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    x = x if weight is None else x * wide(weight)
    return x if bias is None else x + wide(bias)


def _residual(x: Tensor, residual: Tensor | None, in_fp32: bool) -> tuple[Tensor, Tensor]:
    """The sum that is normalised, and as it is handed on: in the residual's dtype."""
    if residual is None:
        return x, x.float() if in_fp32 else x
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    total = wide(x) + wide(residual)
    return total, total.to(residual.dtype)


@replaces("fla.modules.norm.layernorm:group_norm")
def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Any:
    total, residual = _residual(x, residual, residual_in_fp32)
    o = _normalize(total, weight, bias, eps, is_rms_norm, num_groups).to(x.dtype)
    return (o, residual) if prenorm else o


@replaces("fla.modules.norm.layernorm:layer_norm")
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    return group_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)


@replaces("fla.modules.norm.layernorm:rms_norm")
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    return group_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)


@replaces("fla.modules.norm.layernorm:group_norm_linear")
def group_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Any:
    total, residual = _residual(x, residual, residual_in_fp32)
    o = _normalize(total, norm_weight, norm_bias, eps, is_rms_norm, num_groups).to(x.dtype)
    o = linear(o, linear_weight, linear_bias)
    return (o, residual) if prenorm else o


@replaces("fla.modules.norm.layernorm:layer_norm_linear")
def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Any:
    weights = (norm_weight, norm_bias, linear_weight, linear_bias)
    return group_norm_linear(x, *weights, residual, eps, prenorm, residual_in_fp32, is_rms_norm, num_groups)


@replaces("fla.modules.norm.layernorm:rms_norm_linear")
def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    weights = (norm_weight, norm_bias, linear_weight, linear_bias)
    return group_norm_linear(x, *weights, residual, eps, prenorm, residual_in_fp32, True)


@replaces("fla.modules.norm.fused_norm_gate:layer_norm_gated")
def layer_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    total, residual = _residual(x, residual, residual_in_fp32)
    o = (_normalize(total, weight, bias, eps) * _gate(g, activation)).to(x.dtype)
    return (o, residual) if prenorm else o


@replaces("fla.modules.norm.fused_norm_gate:rms_norm_gated")
def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    total, residual = _residual(x, residual, residual_in_fp32)
    o = (_normalize(total, weight, bias, eps, rms=True) * _gate(g, activation)).to(x.dtype)
    return (o, residual) if prenorm else o


@replaces("fla.modules.norm.fused_norm_gate:layer_norm_swish_gate_linear")
def layer_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    o, residual = layer_norm_gated(x, g, norm_weight, norm_bias, "swish", residual, True, residual_in_fp32, eps)
    o = linear(o, linear_weight, linear_bias)
    return (o, residual) if prenorm else o


@replaces("fla.modules.norm.fused_norm_gate:rms_norm_swish_gate_linear")
def rms_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    o, residual = rms_norm_gated(x, g, norm_weight, norm_bias, "swish", residual, True, residual_in_fp32, eps)
    o = linear(o, linear_weight, linear_bias)
    return (o, residual) if prenorm else o


def _gate(g: Tensor, activation: str) -> Tensor:
    if activation not in ("swish", "silu", "sigmoid"):
        raise ValueError(f"activation must be swish, silu or sigmoid, got {activation!r}")
    return torch.sigmoid(wide(g)) if activation == "sigmoid" else F.silu(wide(g))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In x's dtype: a norm's output may be narrower than the parameters."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@replaces("fla.modules.norm.layernorm_gated:layernorm_fn")
def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    groups = 1 if group_size is None else x.shape[-1] // group_size
    if z is None:
        return _normalize(x, weight, bias, eps, is_rms_norm, groups).to(x.dtype)
    gate = F.silu(wide(z))
    if norm_before_gate:
        return (_normalize(x, weight, bias, eps, is_rms_norm, groups) * gate).to(x.dtype)
    return _normalize(wide(x) * gate, weight, bias, eps, is_rms_norm, groups).to(x.dtype)


@replaces("fla.modules.norm.layernorm_gated:rmsnorm_fn")
def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


@replaces("fla.modules.norm.l2norm:l2norm")
def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    total = wide(x)
    o = total * torch.rsqrt(total.square().sum(-1, keepdim=True) + eps)
    return o.to(x.dtype if output_dtype is None else output_dtype)


@replaces("fla.ops.attnres.fused:fused_attnres")
def fused_attnres(
    query: Tensor,
    residuals: Sequence[Tensor],
    rms_weight: Tensor,
    output_rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale: float = 1.0,
    return_weights: bool = False,
    checkpoint_level: int = 1,
) -> Any:
    """residuals, L of [..., D], mixed by the softmax over them of their products with query [D], each normalised."""
    total = wide(torch.stack(tuple(residuals)))
    scores = _normalize(total, rms_weight.flatten(), None, rms_eps, rms=True) @ (wide(query.flatten()) * scale)
    weights = scores.softmax(0)
    o = (weights[..., None] * total).sum(0)
    if output_rms_weight is not None:
        o = _normalize(o, output_rms_weight, None, rms_eps, rms=True)
    o = o.to(residuals[0].dtype)
    return (o, weights) if return_weights else o
