"""The mathematics of attn: what it equals, what it skips, how parts join, long sums, decoding, the pinned graph."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import fla_ops
from fla_ops.attn import reference
from fla_ops.attn.call import RESIDUAL_SCALE, Call, Need, Outputs
from fla_ops.attn.cpu import aten, aten_tiles
from tests import numerics
from tests.cases import EXPORT, cases
from tests.contract.helpers import INTERPRETED, export, listing

B, T, H, HQ, K, V = 2, 37, 3, 6, 10, 7
ON_THE_CPU = pytest.mark.skipif(INTERPRETED, reason="about the ATen implementation")


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal, in float64: what is left over is the difference between two formulas."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(time: int = T, heads: int = H, query_heads: int = HQ, key: int = K, value: int = V) -> dict[str, Tensor]:
    """q, k and v."""
    return {
        "q": draw(B, time, query_heads, key, seed=1),
        "k": draw(B, time, heads, key, seed=2),
        "v": draw(B, time, heads, value, seed=3),
    }


def gates(time: int = T, query_heads: int = HQ, strength: float = 1.0) -> Tensor:
    """Log decays."""
    return -strength * draw(B, time, query_heads, seed=4).abs()


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's attention with a bias [B, HQ, T, T] on the scores."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_equals_pytorch_with_a_bias(window: int | None) -> None:
    x, g = inputs(), gates()
    sums = g.cumsum(1).transpose(1, 2)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    hidden = (j > i) | (i - j >= (window or T))
    bias = (sums[..., :, None] - sums[..., None, :]).masked_fill(hidden, float("-inf"))
    numerics.close(fla_ops.parallel_attn(**x, g=g, window_size=window), by_sdpa(**x, bias=bias))


def test_a_sink_is_a_key_without_a_value() -> None:
    x, sink = inputs(heads=HQ, value=K), draw(HQ, seed=5)
    o = fla_ops.parallel_attn(**x, sink_bias=sink)
    scores = torch.einsum("bihk,bjhk->bhij", x["q"], x["k"]) * K**-0.5
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
    with_sink = torch.cat([scores, sink[None, :, None, None].expand(B, HQ, T, 1)], -1)
    numerics.close(o, torch.einsum("bhij,bjhv->bihv", with_sink.softmax(-1)[..., :-1], x["v"]))


def test_a_step_that_forgets_begins_a_sequence() -> None:
    x, g = {name: y[:1] for name, y in inputs().items()}, gates()[:1]
    cuts = [0, 9, 10, 30, T]
    apart = fla_ops.parallel_attn(**x, g=g, cu_seqlens=torch.tensor(cuts))
    for value in (float("-inf"), -1e4):
        g[:, cuts[:-1]] = value
        numerics.close(fla_ops.parallel_attn(**x, g=g), apart)


def test_window_of_one_gives_the_values() -> None:
    x = inputs()
    numerics.close(fla_ops.parallel_attn(**x, window_size=1), x["v"].repeat_interleave(HQ // H, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_of_none_leaves_the_sinks(dtype: torch.dtype) -> None:
    x = {name: y.to(dtype).requires_grad_() for name, y in inputs().items()}
    sink = draw(HQ, seed=5).float().requires_grad_()
    o, lse, rest = forward(x, window_size=0, sink_bias=sink, output_rest=True)
    assert not o.any()
    assert (rest is not None) == (dtype is torch.bfloat16)
    assert rest is None or not rest.any()
    assert torch.equal(lse, sink.expand_as(lse))
    arriving = draw(*lse.shape, seed=6).float()
    *found, dsink = torch.autograd.grad([o, lse], [*x.values(), sink], [torch.ones_like(o), arriving])
    assert not any(y.any() for y in found)
    numerics.close(dsink, arriving.sum((0, 1)))
    assert forward(x, window_size=0)[1].isneginf().all()


def test_a_window_of_none_does_not_hide_wrong_offsets() -> None:
    x, offsets = {name: y.float() for name, y in caches(4, 9)[0].items()}, torch.tensor([0, 4, 12])
    with pytest.raises(ValueError, match="must end at T = 13, got 12"):
        fla_ops.attn_decoding_one_step(**x, cu_seqlens=offsets, window_size=0)
    x["q"] = draw(1, 13, HQ, K).float()
    with pytest.raises(ValueError, match="must end at T = 13, got 12"):
        fla_ops.parallel_attn(**x, cu_seqlens=offsets, window_size=0)


def forward(x: dict[str, Tensor], **others: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operator behind parallel_attn, with what it keeps for the gradient."""
    return torch.ops.fla.parallel_attn_forward(**x, **others)  # type: ignore[no-any-return]


def test_log_of_the_denominator_and_its_gradient() -> None:
    x, g, sink = inputs(), gates(), draw(HQ, seed=5)
    leaves = [y.clone().requires_grad_() for y in (*x.values(), g, sink)]

    def both(function: Any) -> list[Tensor]:
        q, k, v, gate, bias = leaves
        o, lse = function(q, k, v, gate, None, 9, None, sink_bias=bias)[:2]
        return [o, lse, *torch.autograd.grad([lse.sin().sum()], leaves, allow_unused=True, materialize_grads=True)]

    for found, expected in zip(both(torch.ops.fla.parallel_attn_forward), both(reference.parallel), strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_parts_of_the_keys_join() -> None:
    """Older keys that every row sees, and the rows' own: the logs say how to weigh the two results."""
    x = {name: y[:1] for name, y in inputs(time=20).items()}
    queries = x["q"][:, 10:]
    own, own_log, _ = forward({name: y[:, 10:] for name, y in x.items()})
    keys, values = (x[name][:, :10].repeat_interleave(HQ // H, 2) for name in ("k", "v"))
    scores = torch.einsum("bihk,bjhk->bihj", queries, keys) * K**-0.5
    old, old_log = torch.einsum("bihj,bjhv->bihv", scores.softmax(-1), values), scores.logsumexp(-1)
    total = torch.logaddexp(own_log, old_log)
    joined = own * (own_log - total).exp()[..., None] + old * (old_log - total).exp()[..., None]
    numerics.close(joined, fla_ops.parallel_attn(**x)[:, 10:])


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_prefill_in_chunks_is_the_whole(dtype: torch.dtype, window: int | None) -> None:
    if INTERPRETED and dtype is torch.float64:
        pytest.skip("the kernels compute in float32")
    leaves = {**inputs(), "g": gates(), "sink_bias": draw(HQ, seed=5)}
    leaves = {name: y.requires_grad_() for name, y in leaves.items()}  # the gradients of the chunks add up unrounded
    x = {name: y.to(dtype) for name, y in leaves.items()}
    whole = fla_ops.parallel_attn(**x, window_size=window)

    def chunk(start: int, end: int) -> Tensor:
        x = {name: y.to(dtype) for name, y in leaves.items()}
        x |= {"q": x["q"][:, start:end]} | {name: x[name][:, :end] for name in ("k", "v", "g")}
        return fla_ops.attn_prefill(**x, window_size=window)[0]

    joined = torch.cat([chunk(*cut) for cut in pairwise((0, 1, 8, 21, T))], 1)
    arriving = draw(*whole.shape, seed=6).to(dtype)
    numerics.close(joined, whole)
    found, expected = (torch.autograd.grad(o, list(leaves.values()), arriving) for o in (joined, whole))
    for y, e in zip(found, expected, strict=True):
        numerics.close(y, e, dtype)


def test_keys_that_are_held_apart_join() -> None:
    """Older keys in two pieces, with the decay since, and the rows' own."""
    x, g, sink = inputs(), gates(), draw(HQ, seed=5)
    if INTERPRETED:
        x, g, sink = {name: y.float() for name, y in x.items()}, g.float(), sink.float()
    cuts, rows = ((0, 6), (6, 15)), slice(15, T)
    whole = fla_ops.parallel_attn(**x, g=g, window_size=25, sink_bias=sink)[:, rows]
    own = {name: y[:, rows] for name, y in x.items()}
    found = [forward(own, g=g[:, rows], window_size=25, sink_bias=sink)[:2]]
    for start, end in cuts:
        keys = {name: y[:, start:end] for name, y in {**x, "g": g}.items() if name != "q"}
        decay = g[:, end:].cumsum(1)[:, rows.start - end :]
        gap = rows.start - end
        found.append(fla_ops.attn_prefill(own["q"], **keys, window_size=25, gap=gap, decay=decay))
    total = torch.stack([lse for _, lse in found]).logsumexp(0)
    numerics.close(sum(o * (lse - total).exp()[..., None] for o, lse in found), whole)


def test_flops_of_prefill_count_what_is_seen() -> None:
    x = inputs()

    def count(queries: int, **others: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            fla_ops.attn_prefill(x["q"][:, :queries], x["k"], x["v"], **others)
        return counter.get_total_flops()

    pairs = B * HQ * 2 * (K + V)
    assert count(T) == pairs * T * (T + 1) // 2
    assert count(2) == pairs * (2 * T - 1)
    assert count(2, window_size=5) == pairs * 10
    assert count(2, gap=3) == pairs * 2 * T
    assert count(2, gap=3, window_size=9) == pairs * (5 + 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_rounding_took_is_kept(dtype: torch.dtype) -> None:
    x = {name: y.to(dtype) for name, y in inputs().items()}
    o, _, rest = forward(x, output_rest=True)
    assert rest is not None
    exact, _ = reference.parallel(**{name: y.double() for name, y in x.items()})
    assert numerics.error(o.double() + rest.double() / RESIDUAL_SCALE, exact) < 0.01 * numerics.error(o, exact)
    assert forward(x)[2] is None
    assert forward({name: y.float() for name, y in x.items()}, output_rest=True)[2] is None


def test_rounding_is_kept_only_where_a_gradient_is_wanted() -> None:
    x = {name: y.bfloat16() for name, y in inputs().items()}
    asked = []
    real = torch.ops.fla.parallel_attn_forward

    def record(*args: Any) -> Any:
        asked.append(args[-1])
        return real(*args)

    with mock.patch.object(torch.ops.fla, "parallel_attn_forward", record):
        fla_ops.parallel_attn(**x)
        x["v"].requires_grad_()
        fla_ops.parallel_attn(**x)
    assert asked == [False, True]


@pytest.mark.parametrize("strength", [0.3, 5.0], ids=["moderate", "strong"])
def test_long_running_sums_keep_their_digits(strength: float) -> None:
    """Thousands of steps in, sums are large and their differences small; the last rows need only the last steps."""
    if INTERPRETED:
        pytest.skip("too long for the interpreter")
    time, tail = 6000, 400
    x = {name: y.float() for name, y in inputs(time, 1, 2, 3, 5).items()}
    g = gates(time, 2, strength).float()
    o = fla_ops.parallel_attn(**x, g=g)[:, -50:]
    alone = [y[:, -tail:].double() for y in (*x.values(), g)]
    exact = fla_ops.parallel_attn(*alone)[:, -50:]
    assert numerics.error(o, exact) < 5e-7


@ON_THE_CPU
def test_tiles_that_are_left_out_hold_nothing() -> None:
    x, g = ({name: y.float() for name, y in inputs(300).items()}, gates(300).float())
    leaves = [y.requires_grad_() for y in (*x.values(), g)]

    def run() -> list[Tensor]:
        o = fla_ops.parallel_attn(*leaves)
        return [o, *torch.autograd.grad(o.sin().sum(), leaves)]

    def never(run: aten_tiles.Run, *_: Any) -> tuple[list[bool], list[bool]]:
        chunks = run.extremes[0].shape[-1]
        return [False] * chunks, [True] * chunks

    with mock.patch.multiple(aten_tiles, ROWS=32, COLUMNS=32):
        found = run()
        with mock.patch.object(aten_tiles.Run, "_negligible", never):
            every = run()
    assert all(torch.equal(a, b) for a, b in zip(found, every, strict=True))


def products(time: int, window: int | None = None, strength: float = 0.0) -> int:
    """Multiplications and additions in the matrix products that a forward call makes on a CPU."""
    x = {name: y.float() for name, y in inputs(time).items()}
    with FlopCounterMode(display=False) as counter:
        aten.forward(Call(**x, g=gates(time, HQ, strength).float() if strength else None, window_size=window))
    return counter.get_total_flops()


@ON_THE_CPU
def test_what_is_out_of_sight_is_not_computed() -> None:
    full = products(4096)
    pairs = 4096 * 4097 // 2 * B * HQ
    assert full < 1.15 * pairs * 2 * (K + 1 + V)
    assert products(4096, window=64) < full / 12
    assert products(4096, strength=3.0) < 0.4 * full
    assert products(8192, strength=3.0) < 2.2 * products(4096, strength=3.0)


@ON_THE_CPU
def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    largest: dict[int, int] = {}
    for time in (2048, 8192):
        x = {name: y[:1].float() for name, y in inputs(time, 1, 1, 3, 5).items()}
        g = gates(time, 1)[:1].float()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call = Call(**x, g=g)
            saved = aten.forward(call)
            aten.backward(call, Outputs(saved.o, None, None), Need(True, True, True, True, False), saved)
        largest[time] = max(event.cpu_memory_usage for event in profile.events())
    assert largest[8192] < 4.5 * largest[2048]
    assert largest[8192] < 8192 * 8192


def caches(*lengths: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Queries and packed caches of these lengths, gates, offsets."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    time = int(offsets[-1])
    x = {"q": draw(1, len(lengths), HQ, K), "k": draw(1, time, H, K), "v": draw(1, time, H, V)}
    return x, -draw(1, time, HQ).abs(), offsets


@pytest.mark.parametrize("window", [None, 4])
def test_a_step_is_the_last_row_of_the_parallel_form(window: int | None) -> None:
    x, g, sink = inputs(), gates(), draw(HQ, seed=5)
    rows = fla_ops.parallel_attn(**x, g=g, window_size=window, sink_bias=sink)[:, -1]
    newest = x["q"][:, -1].unsqueeze(0)
    packed = [y.flatten(0, 1).unsqueeze(0) for y in (x["k"], x["v"], g)]
    offsets = T * torch.arange(B + 1)
    if INTERPRETED:
        newest, packed = newest.float(), [y.float() for y in packed]
    o = fla_ops.attn_decoding_one_step(newest, *packed, cu_seqlens=offsets, sink_bias=sink, window_size=window)
    numerics.close(o[0], rows.to(o.dtype))


def test_empty_caches_give_zeros() -> None:
    x, g, offsets = caches(0, 3, 0)
    o = fla_ops.attn_decoding_one_step(**x, g=g, cu_seqlens=offsets, sink_bias=draw(HQ, seed=5))
    assert not o[:, [0, 2]].any()
    assert o[:, 1].all()


def test_gate_scale_multiplies_the_gates() -> None:
    x, g, offsets = caches(4, 9)
    scaled = fla_ops.attn_decoding_one_step(**x, g=g, scale=0.3, cu_seqlens=offsets, do_gate_scale=True)
    numerics.close(scaled, fla_ops.attn_decoding_one_step(**x, g=0.3 * g, scale=0.3, cu_seqlens=offsets))


def test_decoding_reads_only_what_it_sees() -> None:
    """What lies outside the window, or in no cache, may be anything."""
    x, g, offsets = caches(12, 20)
    o = fla_ops.attn_decoding_one_step(**x, g=g, cu_seqlens=offsets, window_size=5)
    for start, end in ((0, 7), (12, 27)):
        for y in (x["k"], x["v"]):
            y[:, start:end] = float("nan")
    assert torch.equal(fla_ops.attn_decoding_one_step(**x, g=g, cu_seqlens=offsets, window_size=5), o)


def test_decoding_needs_offsets_and_has_no_gradient() -> None:
    x, _, offsets = caches(4)
    with pytest.raises(ValueError, match="attn_decoding_one_step needs cu_seqlens"):
        fla_ops.attn_decoding_one_step(**x)
    x["k"].requires_grad_()
    with pytest.raises(NotImplementedError, match="is for inference and has no gradient"):
        fla_ops.attn_decoding_one_step(**x, cu_seqlens=offsets)


def test_explanations() -> None:
    x, _, offsets = caches(4, 9)
    assert fla_ops.explain(fla_ops.attn, **x, cu_seqlens=offsets).form.name == "decoding"
    assert "q has 2 steps and k has 13" in str(fla_ops.explain(fla_ops.attn, **x, cu_seqlens=offsets))
    with pytest.raises(ValueError, match=r"g must be \[1, T, HQ\] = \(1, 13, 6\), got \(1, 13, 3\)"):
        fla_ops.explain(fla_ops.attn, **x, g=draw(1, 13, H), cu_seqlens=offsets)
    whole = inputs()
    assert fla_ops.explain(fla_ops.attn, **whole).form.name == "parallel"
    assert "decoding refuses: decoding needs cu_seqlens" in str(fla_ops.explain(fla_ops.attn, **whole))


def test_flops_know_the_window() -> None:
    x = inputs()

    def count(**others: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            fla_ops.parallel_attn(**x, **others)
        return counter.get_total_flops()

    pairs = B * HQ * 2 * (K + V)
    assert count() == pairs * T * (T + 1) // 2
    assert count(window_size=1) == pairs * T
    assert count(window_size=5) == pairs * (5 * T - 10)
    assert count(window_size=1000) == count()


def test_a_trace_shows_what_was_chosen() -> None:
    (case,) = cases("attn", EXPORT)
    assert_expected_inline(
        listing(export(case).run_decompositions()),
        """\
x_q
x_k
x_v
x_g
x_sink_bias
parallel_attn_forward = fla.parallel_attn_forward(x_q, x_k, x_v, x_g, 0.3, 23, None, None, x_sink_bias)
getitem = getitem(parallel_attn_forward, 0)
output = output((getitem,))""",
    )
