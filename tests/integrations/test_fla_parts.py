"""What stands in for fla's norms, activations, rotary embedding, convolution and losses, against definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fla_ops.integrations.fla import activations, convolution, losses, norms, rotary
from tests.integrations.gradients import against_reference
from tests.numerics import close

WIDTH = 12


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def norm_of(x: Tensor, w: Tensor, b: Tensor, rms: bool, groups: int = 1) -> Tensor:
    """By ATen's norms, a group at a time."""
    parts = zip(*(t.chunk(groups, -1) for t in (x, w, b)), strict=True)
    if rms:
        return torch.cat([F.rms_norm(p, p.shape[-1:], q, 1e-5) + r for p, q, r in parts], -1)
    return torch.cat([F.layer_norm(p, p.shape[-1:], q, r, 1e-5) for p, q, r in parts], -1)


NORMS: dict[str, tuple[Callable[..., Any], dict[str, Any], bool, int]] = {
    "layer": (norms.layer_norm, {}, False, 1),
    "rms": (norms.rms_norm, {}, True, 1),
    "layer-as-rms": (norms.layer_norm, {"is_rms_norm": True}, True, 1),
    "group": (norms.group_norm, {"num_groups": 3}, False, 3),
    "group-rms": (norms.group_norm, {"num_groups": 3, "is_rms_norm": True}, True, 3),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    function, settings, rms, groups = NORMS[name]
    x, r, w, b = draw((2, 5, WIDTH), (2, 5, WIDTH), (WIDTH,), (WIDTH,))
    settings = {"eps": 1e-5, "prenorm": True, **settings}
    against_reference(
        {"x": x, "r": r, "w": w, "b": b},
        lambda x, r, w, b: function(x, w, b, r, **settings),
        lambda x, r, w, b: (norm_of(x + r, w, b, rms, groups), x + r),
    )
    plain = {**settings, "prenorm": False}
    close(function(x, None, None, **plain), norm_of(x, torch.ones_like(w), torch.zeros_like(b), rms, groups))


def test_residuals_are_kept_in_their_dtype() -> None:
    x, r = (t.bfloat16() for t in draw((2, 5, WIDTH), (2, 5, WIDTH)))
    total = x.double() + r.double()
    o, kept = norms.rms_norm(x, None, None, r.float(), prenorm=True)
    assert (o.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
    close(kept.double(), total, torch.float32)
    o, kept = norms.rms_norm(x, None, None, prenorm=True, residual_in_fp32=True)
    assert kept.dtype == torch.float32
    assert torch.equal(kept, x.float())
    close(o.double(), F.rms_norm(x.double(), (WIDTH,), eps=1e-5), torch.bfloat16)
    with pytest.raises(ValueError, match=r"residual must have x's shape \(2, 5, 12\), got \(5, 12\)"):
        norms.rms_norm(x, None, None, r[0])


@pytest.mark.parametrize("rms", [False, True])
def test_norms_before_a_projection(rms: bool) -> None:
    x, r, w, b, p, c = draw((2, 5, WIDTH), (2, 5, WIDTH), (WIDTH,), (WIDTH,), (7, WIDTH), (7,))
    function = norms.rms_norm_linear if rms else norms.layer_norm_linear
    against_reference(
        {"x": x, "r": r, "w": w, "b": b, "p": p, "c": c},
        lambda x, r, w, b, p, c: function(x, w, b, p, c, r, 1e-5, True),
        lambda x, r, w, b, p, c: (F.linear(norm_of(x + r, w, b, rms), p, c), x + r),
    )
    found = norms.group_norm_linear(x, w, b, p, c, is_rms_norm=rms, num_groups=3)
    close(found, F.linear(norm_of(x, w, b, rms, 3), p, c))


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@pytest.mark.parametrize("rms", [False, True])
def test_gated_norms(rms: bool, activation: str) -> None:
    x, g, r, w, b, p, c = draw(*((2, 5, WIDTH),) * 3, (WIDTH,), (WIDTH,), (7, WIDTH), (7,))
    function = norms.rms_norm_gated if rms else norms.layer_norm_gated
    gate = torch.sigmoid if activation == "sigmoid" else F.silu
    against_reference(
        {"x": x, "g": g, "r": r, "w": w, "b": b},
        lambda x, g, r, w, b: function(x, g, w, b, activation, r, True, eps=1e-5),
        lambda x, g, r, w, b: (norm_of(x + r, w, b, rms) * gate(g), x + r),
    )
    if activation == "swish":
        with_projection = norms.rms_norm_swish_gate_linear if rms else norms.layer_norm_swish_gate_linear
        found = with_projection(x, g, w, b, p, c, eps=1e-5)
        close(found, F.linear(norm_of(x, w, b, rms) * gate(g), p, c))


def test_a_gate_of_another_kind() -> None:
    x = torch.ones(2, WIDTH)
    with pytest.raises(ValueError, match="activation must be swish, silu or sigmoid, got 'relu'"):
        norms.rms_norm_gated(x, x, None, None, "relu")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_norms_with_a_gate_before_or_after(rms: bool, before: bool) -> None:
    x, z, w, b = draw((2, 5, WIDTH), (2, 5, WIDTH), (WIDTH,), (WIDTH,))

    def truth(x: Tensor, z: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor]:
        gate = F.silu(z)
        return (norm_of(x, w, b, rms, 3) * gate if before else norm_of(x * gate, w, b, rms, 3),)

    function = norms.rmsnorm_fn if rms else norms.layernorm_fn
    ours = lambda x, z, w, b: (function(x, w, b, z, 1e-5, WIDTH // 3, before),)  # noqa: E731
    against_reference({"x": x, "z": z, "w": w, "b": b}, ours, truth)
    close(function(x, w, b, None, 1e-5), norm_of(x, w, b, rms))


def test_l2norm() -> None:
    (x,) = draw((2, 5, WIDTH))
    against_reference(
        {"x": x}, lambda x: (norms.l2norm(x, 1e-3),), lambda x: (x / (x.pow(2).sum(-1, keepdim=True) + 1e-3).sqrt(),)
    )
    assert norms.l2norm(x.float(), output_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_attention_over_residuals() -> None:
    q, w, ow, *residuals = draw((1, WIDTH), (WIDTH,), (WIDTH,), *((2, 5, WIDTH),) * 3)

    def truth(q: Tensor, w: Tensor, ow: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        scores = [(F.rms_norm(r, (WIDTH,), w, 1e-6) * q).sum(-1) * 0.5 for r in (a, b, c)]
        weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum(0)
        mixed = weights[0, ..., None] * a + weights[1, ..., None] * b + weights[2, ..., None] * c
        return F.rms_norm(mixed, (WIDTH,), ow, 1e-6), weights

    against_reference(
        dict(zip(("q", "w", "ow", "a", "b", "c"), (q, w, ow, *residuals), strict=True)),
        lambda q, w, ow, a, b, c: norms.fused_attnres(q, [a, b, c], w, ow, scale=0.5, return_weights=True),
        truth,
    )


ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "sigmoid": (activations.sigmoid, lambda x: 1 / (1 + (-x).exp())),
    "logsigmoid": (lambda x: activations.logsigmoid(x, 16.0), lambda x: -(1 + (-x).exp()).log() / 16),
    "swish": (activations.swish, lambda x: x / (1 + (-x).exp())),
    "sqrelu": (activations.sqrelu, lambda x: x.clamp(min=0) ** 2),
    "gelu": (activations.gelu, lambda x: x / (1 + (-2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).exp())),
    "elu_p1": (activations.elu_p1, lambda x: F.elu(x) + 1),
}
GATED: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "swiglu": (activations.swiglu, activations.swiglu_linear, lambda x, y: x.sigmoid() * x * y),
    "sigmoidglu": (activations.sigmoidglu, activations.sigmoidglu_linear, lambda x, y: x.sigmoid() * y),
    "powglu": (
        activations.powglu,
        activations.powglu_linear,
        lambda x, y: x.sigmoid() * y * torch.where(x > 0, x.abs() ** (3 / (x.abs().sqrt() + 1)), x),
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    (x,) = draw((2, 5, WIDTH))
    ours, truth = ACTIVATIONS[name]
    against_reference({"x": x}, lambda x: (ours(x),), lambda x: (truth(x),))


@pytest.mark.parametrize("name", GATED)
def test_gated_activations(name: str) -> None:
    x, y, w, b = draw((2, 5, WIDTH), (2, 5, WIDTH), (7, WIDTH), (7,))
    ours, with_projection, truth = GATED[name]
    against_reference(
        {"x": x, "y": y, "w": w, "b": b},
        lambda x, y, w, b: (ours(x, y), with_projection(x, y, w, b)),
        lambda x, y, w, b: (truth(x, y), F.linear(truth(x, y), w, b)),
    )


def test_biased_gelu() -> None:
    x, b = draw((2, 5, WIDTH), (WIDTH,))
    close(activations.bias_gelu(x, b), F.gelu(x + b, approximate="tanh"))


def turned(x: Tensor, positions: list[int], interleaved: bool, width: int) -> Tensor:
    """x [T, H, D], each pair of the first channels as a complex number, by its angle."""
    rest = x[..., width:]
    first = x[..., :width].double()
    pairs = first.unflatten(-1, (-1, 2)) if interleaved else torch.stack(first.chunk(2, -1), -1)
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * angular_frequencies(width)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_real(turned)
    return torch.cat([pairs.flatten(-2) if interleaved else torch.cat(pairs.unbind(-1), -1), rest.double()], -1)


def angular_frequencies(width: int) -> Tensor:
    return 10000.0 ** -(torch.arange(0, width, 2).double() / width)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(interleaved: bool) -> None:
    (x,) = draw((2, 6, 3, 10))
    angles = torch.arange(20)[:, None] * angular_frequencies(8)
    tables = (angles.cos(), angles.sin(), interleaved)
    for offset, starts in ((4, (4, 4)), (torch.tensor([0, 7]), (0, 7))):
        expected = [turned(row, list(range(n, n + 6)), interleaved, 8) for row, n in zip(x, starts, strict=True)]
        close(rotary.rotary_embedding(x, *tables, seqlen_offsets=offset), torch.stack(expected))
    offsets = torch.tensor([0, 2, 6])
    found = rotary.rotary_embedding(x[:1], *tables, cu_seqlens=offsets, seqlen_offsets=torch.tensor([3, 0]))
    close(found[0], turned(x[0], [3, 4, 0, 1, 2, 3], interleaved, 8))
    copy = x.clone()
    assert rotary.rotary_embedding(copy, *tables, inplace=True) is copy
    close(copy, rotary.rotary_embedding(x, *tables))


def convolve(x: Tensor, w: Tensor, b: Tensor, before: Tensor) -> Tensor:
    """x [T, D] after before [W, D], step by step."""
    taps = w.shape[1]
    seen = torch.cat([before, x])
    rows = [(seen[t + 1 : t + 1 + taps] * w.T).sum(0) for t in range(x.shape[0])]
    return F.silu(torch.stack(rows) + b)


def test_convolution() -> None:
    x, r, w, b, state = draw((2, 6, 5), (2, 6, 5), (5, 4), (5,), (2, 5, 4))
    against_reference(
        {"x": x, "r": r, "w": w, "b": b, "state": state},
        lambda x, r, w, b, state: convolution.causal_conv1d(x, w, b, r, state, True, "silu"),
        lambda x, r, w, b, state: (
            torch.stack([convolve(x[n], w, b, state[n].T) for n in range(2)]) + r,
            torch.cat([state, x.mT], -1)[..., -4:],
        ),
    )
    for time in (1, 6):
        o, final = convolution.causal_conv1d(x[:, :time], w, b, output_final_state=True, activation="silu")
        close(o[1], convolve(x[1, :time], w, b, torch.zeros(4, 5, dtype=torch.float64)))
        close(final, F.pad(x[:, :time].mT, (4, 0))[..., -4:])


def test_packed_convolution() -> None:
    """Sequences shorter than the window, too, and an empty one."""
    lengths = (3, 1, 0, 6)
    x, r, w, b, state = draw((1, 10, 5), (1, 10, 5), (5, 4), (5,), (4, 5, 4))
    offsets = torch.tensor([0, 3, 4, 4, 10])

    def truth(x: Tensor, r: Tensor, w: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        runs = x[0].split(lengths)
        o = [convolve(run, w, b, state[n].T) for n, run in enumerate(runs) if len(run) > 0]
        final = [torch.cat([state[n], run.T], -1)[:, -4:] for n, run in enumerate(runs)]
        return torch.cat(o)[None] + r, torch.stack(final)

    def ours(x: Tensor, r: Tensor, w: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return convolution.causal_conv1d(x, w, b, r, state, True, "silu", cu_seqlens=offsets)

    against_reference({"x": x, "r": r, "w": w, "b": b, "state": state}, ours, truth)
    o, final = convolution.causal_conv1d(x, w, b, r, None, True, "silu", cu_seqlens=offsets)
    expected = truth(x, r, w, b, torch.zeros_like(state))
    close(o, expected[0])
    close(final, expected[1])


@pytest.mark.parametrize("shape", [(3, 5), (3, 1, 5), (1, 3, 5)])
def test_a_step_of_the_convolution(shape: tuple[int, ...]) -> None:
    x, r, w, b, cache = draw(shape, shape, (5, 4), (5,), (3, 5, 4))
    new = torch.cat([cache, x.view(3, 5, 1)], -1)[..., 1:]
    o, after = convolution.causal_conv1d_update(x, cache, r, w, b, "silu")
    assert after is cache
    assert torch.equal(cache, new)
    close(o, F.silu((new * w).sum(-1) + b).view(shape) + r)


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float, scale: float, square: float, cap: float) -> Tensor:
    """[N], zero where the target is -1."""
    logits = cap * torch.tanh(logits * scale / cap)
    lse = logits.exp().sum(-1).log()
    rows = []
    for row, total, index in zip(logits, lse, target.tolist(), strict=True):
        wanted = (1 - smoothing) * row[index] + smoothing * row.mean()
        rows.append((total - wanted + square * total**2) * (index >= 0))
    return torch.stack(rows)


SETTINGS = (0.1, 0.7, 0.02, 5.0)  # label_smoothing, logit_scale, lse_square_scale, logit_softcapping
TARGET = torch.tensor([3, -1, 0, 8, 5])


def test_cross_entropy() -> None:
    (logits,) = draw((5, 9))
    ours = lambda x: (losses.cross_entropy_loss(x, TARGET, *SETTINGS, ignore_index=-1)[0],)  # noqa: E731
    against_reference({"x": logits}, ours, lambda x: (cross_entropy(x, TARGET, *SETTINGS),))
    loss, penalty = losses.cross_entropy_loss(logits.requires_grad_(), TARGET, *SETTINGS, ignore_index=-1)
    assert not penalty.requires_grad
    without = cross_entropy(logits, TARGET, 0.1, 0.7, 0.0, 5.0)
    close(penalty, (loss - without).detach())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy(reduction: str) -> None:
    x, w, b = draw((5, 6), (9, 6), (9,))
    square = 1e-2

    def truth(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor]:
        logits = F.linear(x, w, b)
        loss = cross_entropy(logits, TARGET, 0.1, 0.7, 0.0, 5.0).sum() / (4 if reduction == "mean" else 1)
        penalty = square / (2 * 5) * (logits.max(-1).values ** 2).sum()
        return (loss + penalty - penalty.detach(),)

    def ours(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor]:
        settings = (-1, 0.1, 0.7, 5.0, 3, reduction, True, square)
        return (losses.fused_linear_cross_entropy_loss(x, TARGET, w, b, *settings),)

    against_reference({"x": x, "w": w, "b": b}, ours, truth)


def test_linear_cross_entropy_makes_the_logits_of_one_chunk() -> None:
    x, w = (t.float().requires_grad_() for t in draw((64, 6), (50, 6)))
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            o = func(*args, **(kwargs or {}))
            largest = max(largest, o.numel() if isinstance(o, Tensor) else 0)
            return o

    with Sizes():
        losses.fused_linear_cross_entropy_loss(x, torch.arange(64) % 50, w, num_chunks=8).backward()
    assert largest == 64 // 8 * 50


def test_divergence_of_a_student_from_a_teacher() -> None:
    x, w, teacher_x, teacher_w = draw((5, 6), (9, 6), (5, 4), (9, 4))
    teacher = F.linear(teacher_x, teacher_w).softmax(-1)

    def truth(x: Tensor, w: Tensor) -> tuple[Tensor]:
        student = F.linear(x, w).softmax(-1)
        return ((teacher.to(x.dtype) * (teacher.to(x.dtype) / student).log()).sum() / 5,)

    def ours(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return (losses.fused_kl_div_loss(x, teacher_x.to(x.dtype), w, teacher_w.to(x.dtype)),)

    against_reference({"x": x, "w": w}, ours, truth)
    with pytest.raises(RuntimeError, match="takes no gradient: detach them"):
        losses.fused_kl_div_loss(x, teacher_x.requires_grad_(), w, teacher_w)


def test_what_is_not_served_is_refused_by_name() -> None:
    x, w = torch.ones(1, 4, 5), torch.ones(5, 4)
    with pytest.raises(NotImplementedError, match="serves causal_conv1d without cp_context"):
        convolution.causal_conv1d(x, w, cp_context=object())
    with pytest.raises(NotImplementedError, match="serves causal_conv1d without seq_idx"):
        convolution.causal_conv1d(x, w, seq_idx=torch.zeros(1, 4))
    with pytest.raises(NotImplementedError, match=r"causal_conv1d with a weight \[D, W\], got None"):
        convolution.causal_conv1d(x)
    with pytest.raises(NotImplementedError, match="serves cross_entropy_loss without process_group"):
        losses.cross_entropy_loss(x[0], TARGET[:4], process_group=object())
