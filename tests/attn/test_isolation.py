"""What does not spread in attn: a NaN to other sequences, a bad gate to earlier rows, company to the last bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fla_ops
from tests.contract.helpers import INTERPRETED

B, H, HQ, K, V = 3, 2, 4, 5, 3
TIME = 40 if INTERPRETED else 600  # blocks of rows on the diagonal, and columns before them
NAMES = ("q", "k", "v", "g")
BAD = [float("nan"), float("inf")]
ON_THE_CPU = pytest.mark.skipif(INTERPRETED, reason="about the ATen implementation")


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(batch: int, time: int) -> dict[str, Tensor]:
    """q, k, v and g."""
    return {
        "q": draw(batch, time, HQ, K, seed=1),
        "k": draw(batch, time, H, K, seed=2),
        "v": draw(batch, time, H, V, seed=3),
        "g": -draw(batch, time, HQ, seed=4).abs(),
    }


def evaluate(x: dict[str, Tensor], offsets: Tensor | None) -> dict[str, Tensor]:
    """The output, and the gradient of q, k, v and g."""
    leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
    o = fla_ops.parallel_attn(**leaves, cu_seqlens=offsets)
    found = torch.autograd.grad(o, list(leaves.values()), draw(*o.shape, seed=5))
    return {"o": o.detach(), **{f"d{name}": y for name, y in zip(leaves, found, strict=True)}}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "pack"])
def test_a_nan_stays_in_its_sequence(packed: bool, name: str) -> None:
    time = TIME // 2
    x = inputs(B, time)
    offsets = None
    if packed:
        x = {key: y.flatten(0, 1).unsqueeze(0) for key, y in x.items()}
        offsets = time * torch.arange(B + 1)
    expected = evaluate(x, offsets)
    x[name].view(B, time, -1)[1, time // 2] = float("nan")
    for key, y in evaluate(x, offsets).items():
        of_each, clean = (z.view(B, time, -1) for z in (y, expected[key]))
        assert torch.equal(of_each[::2], clean[::2]), key
        assert key != "o" or of_each[1].isnan().any()


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("step", [1, TIME // 3, TIME - 1], ids=["early", "within-a-block", "last"])
@pytest.mark.parametrize("window", [None, 9])
def test_a_bad_gate_spares_the_rows_before_it(window: int | None, step: int, bad: float) -> None:
    x = inputs(1, TIME)
    expected = fla_ops.parallel_attn(**x, window_size=window)
    x["g"][:, step, 0] = bad
    o = fla_ops.parallel_attn(**x, window_size=window)
    assert torch.equal(o[:, :step], expected[:, :step])
    assert torch.equal(o[:, :, 1:], expected[:, :, 1:])
    assert o[:, step:, 0].isnan().all()


@ON_THE_CPU
def test_a_bad_gate_does_not_keep_large_scores_from_being_rescaled() -> None:
    """Early keys are far longer than late ones: scores there are beyond what exp2 can hold."""
    x = inputs(1, TIME)
    x["k"][:, :100] *= 200
    expected = fla_ops.parallel_attn(**x)
    x["g"][:, -1] = float("nan")
    o = fla_ops.parallel_attn(**x)
    assert expected.isfinite().all()
    assert torch.equal(o[:, :-1], expected[:, :-1])


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_stays_in_its_cache(name: str) -> None:
    x, offsets = inputs(1, TIME), torch.tensor([0, 7, 7, 25, TIME])
    x["q"] = x["q"][:, :4].clone()
    expected = fla_ops.attn_decoding_one_step(**x, cu_seqlens=offsets)
    x[name][:, 2 if name == "q" else 20] = float("nan")
    o = fla_ops.attn_decoding_one_step(**x, cu_seqlens=offsets)
    others = [0, 1, 3]
    assert torch.equal(o[:, others], expected[:, others])
    assert o[:, 2].isnan().any()


@ON_THE_CPU
@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("width", [3, 10, 64])
def test_a_cache_gives_the_same_bits_wherever_it_lies(width: int, group: int) -> None:
    """Matrix products may depend, in their last bits, on the alignment of what they multiply."""
    lengths = (5, 37, 1, 100, 64)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    time = int(offsets[-1])
    q, k, v = draw(1, len(lengths), 3 * group, width), draw(1, time, 3, width), draw(1, time, 3, width)
    o = fla_ops.attn_decoding_one_step(q, k, v, cu_seqlens=offsets)
    for n, (start, end) in enumerate(offsets.unfold(0, 2, 1).tolist()):
        own = [x.clone() for x in (q[:, n : n + 1], k[:, start:end], v[:, start:end])]
        alone = fla_ops.attn_decoding_one_step(*own, cu_seqlens=torch.tensor([0, end - start]))
        assert torch.equal(alone, o[:, n : n + 1])


@ON_THE_CPU
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("time", [1, 19, 70])
def test_a_sequence_gives_the_same_bits_in_any_batch(time: int, heads: int) -> None:
    """The number of matrices that are multiplied together may decide which kernel multiplies them."""
    x = {name: draw(7, time, heads, 10, seed=i) for i, name in enumerate("qkv")}
    o = fla_ops.parallel_attn(**x)
    for n in range(7):
        own = {name: y[n : n + 1].clone() for name, y in x.items()}
        assert torch.equal(fla_ops.parallel_attn(**own), o[n : n + 1])
