"""What is particular to simple_gla's kernels: tiles, ragged chunks, resets, single gradients, odd slots."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fla_ops.simple_gla import reference
from fla_ops.simple_gla.call import Call, Need, Outputs, Step, Weighted, WeightsNeed
from fla_ops.simple_gla.gpu import chunk, decoding, fused_chunk, fused_recurrent, parallel
from tests import numerics
from tests.contract.helpers import INTERPRETED

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before Triton is imported"),
    pytest.mark.usefixtures("poisoned_memory"),
]

Op = Callable[..., tuple[Tensor | None, ...]]
NAMES = ("q", "k", "v", "g", "initial_state")


def inputs(time: int, key: int, value: int, key_heads: int = 1, heads: int = 2, sequences: int = 1) -> list[Tensor]:
    """q, k, v, g and an initial state, float32; every seventh gate forgets, the first of them at a chunk's end."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, time, key_heads, key) for _ in range(2))
    g = -2 * torch.rand(1, time, heads)
    g[:, 15::7] = float("-inf")
    g[:, 18::7] = -1e4
    return [q, k, torch.randn(1, time, heads, value), g, torch.randn(sequences, heads, key, value)]


def truth(x: list[Tensor], cu_seqlens: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """float64 outputs and gradients of the recurrence, and the output gradients that they belong to."""
    wide = [y.double().requires_grad_() for y in x]
    o, final = reference.recurrent(*wide[:4], initial_state=wide[4], cu_seqlens=cu_seqlens)
    do, dfinal = torch.randn(o.shape), torch.randn(final.shape)
    gradients = torch.autograd.grad((o, final), wide, (do.double(), dfinal.double()))
    named = {f"d{name}": y for name, y in zip(NAMES, gradients, strict=True)}
    return {"o": o.detach(), "final_state": final.detach(), **named}, do, dfinal


def close(results: dict[str, Tensor | None], truths: dict[str, Tensor]) -> None:
    """Within the floor of float32 of the truth."""
    for name, result in results.items():
        assert result is not None
        assert numerics.error(result, truths[name]) <= numerics.FLOOR[torch.float32], name


def run(form: Op, x: list[Tensor], do: Tensor, dfinal: Tensor, cu_seqlens: Tensor | None, size: int) -> dict:
    """Outputs and every gradient of a chunk form."""
    q, k, v, g, state = x
    c = Call(q, k, v, g, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, chunk_size=size)
    o, final = form.forward(c)
    dq, dk, dv, dg, dgamma, dstate = form.backward(c, Outputs(do, dfinal), Need(True, True, True, True, False, True))
    assert dgamma is None
    gradients = zip((f"d{name}" for name in NAMES), (dq, dk, dv, dg, dstate), strict=True)
    return {"o": o, "final_state": final, **dict(gradients)}


@pytest.mark.parametrize("form", [chunk, fused_chunk], ids=["chunk", "fused_chunk"])
@pytest.mark.parametrize(
    ("time", "key", "value", "size"),
    [
        pytest.param(37, 5, 3, 16, id="ragged-tail-and-narrow"),
        pytest.param(33, 40, 17, 32, id="several-key-tiles"),
        pytest.param(16, 20, 70, 16, id="several-value-tiles-and-one-whole-chunk"),
        pytest.param(50, 12, 9, 256, id="a-tile-smaller-than-the-chunk-asked-for"),
        pytest.param(20, 72, 9, 16, id="a-key-wider-than-any-float32-entry"),
    ],
)
def test_tiles(form: Op, time: int, key: int, value: int, size: int) -> None:
    x = inputs(time, key, value)
    truths, do, dfinal = truth(x)
    close(run(form, x, do, dfinal, None, size), truths)


@pytest.mark.parametrize("form", [chunk, fused_chunk], ids=["chunk", "fused_chunk"])
def test_packed_sequences_of_zero_one_and_whole_chunks(form: Op) -> None:
    cu_seqlens = torch.tensor([0, 0, 1, 17, 33, 33, 40], dtype=torch.int32)
    x = inputs(40, 6, 11, sequences=6)
    truths, do, dfinal = truth(x, cu_seqlens)
    close(run(form, x, do, dfinal, cu_seqlens, 16), truths)


@pytest.mark.parametrize("wanted", range(5), ids=NAMES)
def test_gradients_one_by_one(wanted: int) -> None:
    x = inputs(19, 6, 11, key_heads=2, heads=4)
    truths, do, dfinal = truth(x)
    q, k, v, g, state = x
    position = (0, 1, 2, 3, 5)[wanted]
    mask = [i == position for i in range(6)]
    c = Call(q, k, v, g, initial_state=state, chunk_size=16)
    for form in (chunk, fused_chunk, fused_recurrent):
        gradients = form.backward(c, Outputs(do, dfinal), Need(*mask))
        assert [y is not None for y in gradients] == mask
        close({f"d{NAMES[wanted]}": gradients[position]}, truths)


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
def test_recurrent_gate_gradient_over_kept_states(reverse: bool) -> None:
    """Three chunks of kept states, the last ragged; backwards in time equals the mirror image."""
    x = inputs(131, 4, 3)
    truths, do, dfinal = truth(x)
    q, k, v, g, state = (y.flip(1) if reverse and i < 4 else y for i, y in enumerate(x))
    mask = [False, False, False, True, False, False]
    c = Call(q, k, v, g, initial_state=state, reverse=reverse)
    dg = fused_recurrent.backward(c, Outputs(do.flip(1) if reverse else do, dfinal), Need(*mask))[3]
    close({"dg": dg.flip(1) if reverse else dg}, truths)


def test_attentions_and_their_gradient_in_packed_sequences() -> None:
    cu_seqlens = torch.tensor([0, 0, 45, 46, 80])
    q, k, v, g, _ = inputs(80, 6, 40)
    wide = [y.double().requires_grad_() for y in (q, k, v, g)]
    o, attn = reference.parallel(*wide, cu_seqlens=cu_seqlens)
    do, dattn = torch.randn(o.shape), torch.randn(attn.shape)
    gradients = torch.autograd.grad((o, attn), wide, (do.double(), dattn.double()))
    truths = {"o": o, "attn": attn, **dict(zip("qkvg", gradients, strict=True))}

    c = Call(q, k, v, g, output_attentions=True, cu_seqlens=cu_seqlens)
    results = dict(zip(("o", "attn"), parallel.forward(c), strict=True))
    found = parallel.backward(c, Weighted(do, dattn), WeightsNeed(True, True, True, True, False))
    close({**results, **dict(zip("qkvg", found, strict=False))}, truths)


def test_step_takes_a_strided_pool_and_leaves_what_no_slot_names() -> None:
    torch.manual_seed(0)
    sequences, heads, key, value, rows = 4, 2, 70, 5, 3
    q, k = (torch.randn(sequences, heads, key) for _ in range(2))
    v, g = torch.randn(sequences, heads, value), -torch.rand(sequences, heads)
    pool = torch.randn(rows, heads, value, key).mT
    before = pool.clone()
    o = decoding.step(Step(q, k, v, pool, g, slots=torch.tensor([2, -1, 3, 0])))

    for n, row in ((0, 2), (3, 0)):
        one = [y[n : n + 1, None] for y in (q, k, v, g)]
        expected, state = reference.recurrent(*one, initial_state=before[row : row + 1])
        numerics.close(o[n], expected[0, 0])
        numerics.close(pool[row], state[0])
    assert torch.equal(pool[1], before[1])
    assert not o[1].any()
    assert o[2].isnan().all()
