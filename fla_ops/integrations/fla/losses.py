"""fla's losses as ATen. Logits of a linear loss are made for one chunk of the tokens at a time, and once more for the
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fla_ops.integrations.fla.norms import wide
from fla_ops.integrations.fla.refusing import refuse
from fla_ops.integrations.fla.replacing import replaces


@replaces("fla.modules.fused_cross_entropy.ops:cross_entropy_loss")
def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    logit_softcapping: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """logits [N, V], target [N]: the losses [N], and of each the part that the square of the logarithm of the
    denominator has in it, without gradient. inplace_backward is a permission, of which no use is made.
    """
    refuse("cross_entropy_loss", process_group=process_group)
    logits = wide(logits) * logit_scale
    if logit_softcapping is not None:
        logits = logit_softcapping * torch.tanh(logits / logit_softcapping)
    kept = target != ignore_index
    lse = logits.logsumexp(-1)
    chosen = logits.gather(-1, target.masked_fill(~kept, 0)[:, None])[:, 0]
    if label_smoothing > 0:
        chosen = (1 - label_smoothing) * chosen + label_smoothing * logits.mean(-1)
    penalty = lse_square_scale * lse.square()
    loss = torch.where(kept, lse - chosen + penalty, 0.0)
    return loss, torch.where(kept, penalty, 0.0).detach()


@replaces("fla.modules.fused_cross_entropy.ops:FusedCrossEntropyLoss.forward")
def cross_entropy_forward(self: Any, input: Tensor, target: Tensor) -> Any:  # noqa: A002    # fla's name
    settings = (self.label_smoothing, self.logit_scale, self.lse_square_scale, self.logit_softcapping)
    losses: tuple[Tensor, ...] = cross_entropy_loss(
        input, target, *settings, self.ignore_index, process_group=self.process_group
    )
    if self.reduction != "none":
        losses = tuple(loss.sum() for loss in losses)
    if self.reduction == "mean":
        total = (target != self.ignore_index).sum()
        losses = tuple(loss / total for loss in losses)
    return losses if self.return_z_loss else losses[0]


@replaces("fla.modules.fused_linear_cross_entropy.ops:fused_linear_cross_entropy_loss")
def fused_linear_cross_entropy_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcapping: float | None = None,
    num_chunks: int = 8,
    reduction: str = "mean",
    use_l2warp: bool = False,
    l2_penalty_factor: float = 1e-4,
    accumulate_grad_in_fp32: bool = True,
    process_group: Any = None,
) -> Tensor:
    """x [N, D], target [N], weight [V, D]: one number, the cross entropy of x weight^T + bias.

    use_l2warp adds to the gradient of a row's largest logit, and nothing to the loss.
    """
    refuse("fused_linear_cross_entropy_loss", process_group=process_group)

    def of_chunk(x: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        settings = (label_smoothing, logit_scale, 0.0, logit_softcapping, ignore_index)
        loss = cross_entropy_loss(logits, target, *settings)[0].sum()
        if not use_l2warp:
            return loss[None]
        largest = wide(logits).gather(-1, logits.argmax(-1, keepdim=True))
        return torch.stack([loss, largest.square().sum()])

    weights = (weight, bias)
    if accumulate_grad_in_fp32:  # autograd sums up the chunks' gradients in the dtype that they share
        weights = (wide(weight), None if bias is None else wide(bias))
    sums = _over_chunks(of_chunk, (x, target), weights, num_chunks)
    loss = sums[0] / (target != ignore_index).sum().clamp(min=1) if reduction == "mean" else sums[0]
    if use_l2warp:
        penalty = l2_penalty_factor / (2 * x.shape[0]) * sums[1]
        loss = loss + (penalty - penalty.detach())
    return loss


@replaces("fla.modules.fused_linear_cross_entropy.ops:FusedLinearCrossEntropyLoss.forward")
def linear_cross_entropy_forward(
    self: Any, x: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    return fused_linear_cross_entropy_loss(
        x.reshape(-1, x.shape[-1]),
        target.reshape(-1),
        weight,
        bias,
        self.ignore_index,
        self.label_smoothing,
        self.logit_scale,
        self.logit_softcapping,
        self.num_chunks,
        self.reduction,
        self.use_l2warp,
        self.l2_penalty_factor,
        self.accumulate_grad_in_fp32,
        self.process_group,
    )


@replaces("fla.modules.fused_kl_div.ops:fused_kl_div_loss")
def fused_kl_div_loss(
    x: Tensor,
    target_x: Tensor,
    weight: Tensor,
    target_weight: Tensor,
    reduction: str = "batchmean",
    accumulate_grad_in_fp32: bool = True,
) -> Tensor:
    """x and target_x [N, D], weight and target_weight [V, D]: one number, the divergence of a student from a teacher
    that takes no gradient, divided by N.
    """
    if target_x.requires_grad or target_weight.requires_grad:
        raise RuntimeError("target_x and target_weight are a teacher's, which takes no gradient: detach them")
    if reduction != "batchmean":
        raise ValueError(f"reduction must be batchmean, got {reduction!r}")

    def of_chunk(x: Tensor, target_x: Tensor, weight: Tensor, target_weight: Tensor | None) -> Tensor:
        student, teacher = (
            wide(F.linear(x, w.to(x.dtype))).log_softmax(-1)  # type: ignore[union-attr]    # both are there
            for x, w in ((x, weight), (target_x, target_weight))
        )
        return F.kl_div(student, teacher, reduction="sum", log_target=True)

    weights = (wide(weight) if accumulate_grad_in_fp32 else weight, target_weight)
    return _over_chunks(of_chunk, (x, target_x), weights, 8) / x.shape[0]


def _over_chunks(
    of_chunk: Callable[..., Tensor],
    rows: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor | None],
    num_chunks: int,
) -> Tensor:
    """The sum over chunks of the rows; autograd keeps a chunk's rows and computes it again."""
    chunks = zip(*(x.chunk(num_chunks) for x in rows), strict=True)
    parts = [
        checkpoint(of_chunk, *chunk, *weights, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else of_chunk(*chunk, *weights)
        for chunk in chunks
    ]
    return torch.stack(parts).sum(0)
