"""The decode step of linear_attn: equal to the recurrence, both parts of the state in place, in pools of slots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fla_ops
from tests import numerics

B, T, HK, H, K, V = 2, 37, 3, 6, 10, 7


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def sequence() -> dict[str, Tensor]:
    """q and k, as a feature map makes them, and v."""
    q, k = (torch.nn.functional.elu(draw(B, T, HK, K, seed=i)) + 1 for i in (1, 2))
    return {"q": q, "k": k, "v": draw(B, T, H, V, seed=3)}


def states() -> tuple[Tensor, Tensor]:
    """Both parts of a state."""
    return draw(B, H, K, V, seed=5), draw(B, 1, H, K, seed=6).abs()


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "not-normalised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decoding_equals_the_recurrence(dtype: torch.dtype, normalize: bool) -> None:
    """A prompt in one piece, then step after step in place, with the sequences anywhere in the pools."""
    arguments = {n: x.to(dtype) for n, x in sequence().items()}
    options = {"output_final_state": True, "normalize": normalize}
    whole, final = fla_ops.fused_recurrent_linear_attn(**arguments, **options)
    o, state = fla_ops.chunk_linear_attn(**{n: x[:, :12] for n, x in arguments.items()}, **options)
    state, final = (x if normalize else (x,) for x in (state, final))
    slots = torch.tensor([4, -1, 0])
    pools = [torch.full((5, *x.shape[1:]), float("nan")).index_copy(0, slots[::2], x.float()) for x in state]
    outputs = [o]
    for t in range(12, T):
        q, k, v = (torch.stack([x[0, t], x[0, t], x[1, t]]) for x in arguments.values())  # the second one is padding
        step = fla_ops.linear_attn_step_(q, k, v, *pools, slots=slots)
        assert step.dtype is dtype
        assert step[1].count_nonzero() == 0
        outputs.append(step[::2, None])
    numerics.close(torch.cat(outputs, 1), whole)
    for pool, last in zip(pools, final, strict=True):
        numerics.close(pool[slots[::2]], last.float(), dtype)
        assert pool[1:4].isnan().all()


def test_float16_does_not_overflow_in_decoding() -> None:
    q, k = (torch.full((1, 1, 16), 40.0, dtype=torch.float16) for _ in range(2))
    v = torch.full((1, 1, 2), 2.0, dtype=torch.float16)
    state, z = torch.zeros(1, 1, 16, 2), torch.zeros(1, 1, 1, 16)
    for _ in range(64):
        o = fla_ops.linear_attn_step_(q, k, v, state, z)
        numerics.close(o, v)


def test_decoding_refuses_a_gradient() -> None:
    q, k, v = (x[:, 0].float() for x in sequence().values())
    kv, z = (x.float() for x in states())
    with pytest.raises(NotImplementedError, match="is for inference and has no gradient"):
        fla_ops.linear_attn_step_(q.requires_grad_(), k, v, kv, z)


def test_a_step_that_is_refused_updates_nothing() -> None:
    q, k, v = (x[:, 0].float() for x in sequence().values())
    kv, z = (x.float() for x in states())
    before = kv.clone()
    with pytest.raises(ValueError, match="z must be"):
        fla_ops.linear_attn_step_(q, k, v, kv, z[:, :, 1:])
    assert torch.equal(kv, before)
