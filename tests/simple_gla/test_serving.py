"""simple_gla for servers: equal to the forms and to decode steps bit for bit, in place, compiled without a copy."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fla_ops
from tests import numerics
from tests.cases import cases, results

P, HK, H, K, V = 9, 3, 6, 10, 7
OFFSETS = (0, 70, 71, 71, 100, 230)  # ragged, one token, empty, ragged, more than two chunks
SLOTS = (7, 0, 3, -1, 5)
USED = [n for n, row in enumerate(SLOTS) if row >= 0]
ROWS = [SLOTS[n] for n in USED]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def pack(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """q, k, v and g of five sequences, with their offsets."""
    time = OFFSETS[-1]
    q, k, v = (draw(1, time, *shape, seed=i, dtype=dtype) for i, shape in enumerate([(HK, K), (HK, K), (H, V)]))
    return {"q": q, "k": k * K**-0.5, "v": v, "g": -draw(1, time, H, seed=3).abs(), "cu_seqlens": torch.tensor(OFFSETS)}


def without_padding(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sequences of a pack that have rows."""
    lengths = x["cu_seqlens"].diff()
    kept = torch.repeat_interleave(torch.tensor(SLOTS) >= 0, lengths)
    offsets = torch.nn.functional.pad(lengths[USED].cumsum(0), (1, 0))
    return {name: y[:, kept] for name, y in x.items() if name != "cu_seqlens"} | {"cu_seqlens": offsets}


@pytest.mark.parametrize("threads", [1, 2, 64], ids=["one-thread", "two-threads", "more-threads-than-walks"])
@pytest.mark.parametrize("value_first", [False, True], ids=["key-first", "value-first"])
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill_is_the_chunk_form_on_rows_of_the_pool(
    dtype: torch.dtype, pool_dtype: torch.dtype, value_first: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whichever way the work is shared; rows that no slot names keep theirs."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, fresh = pack(dtype), torch.tensor([False, False, False, False, True])
    pool = draw(P, H, *((V, K) if value_first else (K, V)), dtype=pool_dtype)
    before = pool.clone()
    o = fla_ops.simple_gla_prefill_(**x, state=pool, slots=torch.tensor(SLOTS), fresh=fresh, state_v_first=value_first)
    initial = before[ROWS].masked_fill(fresh[USED, None, None, None], 0)
    real = without_padding(x)
    expected, final = fla_ops.chunk_simple_gla(
        **real, initial_state=initial, output_final_state=True, state_v_first=value_first
    )
    assert torch.equal(pool[ROWS], final.to(pool_dtype))
    assert torch.equal(without_padding(x | {"q": o})["q"], expected)
    others = [p for p in range(P) if p not in SLOTS]
    assert torch.equal(pool[others], before[others])


def test_a_token_among_prompts_is_a_decode_step() -> None:
    x, pool = pack(), draw(P, H, K, V)
    own, at = pool.clone(), OFFSETS[1]
    o = fla_ops.simple_gla_prefill_(**x, state=pool, slots=torch.tensor(SLOTS))
    token = [x[name][:, at] for name in ("q", "k", "v")]
    expected = fla_ops.simple_gla_step_(*token, own, x["g"][:, at], slots=torch.tensor([SLOTS[1]]))
    numerics.close(o[0, at], expected[0])
    numerics.close(pool[SLOTS[1]], own[SLOTS[1]])


def test_fresh_sequences_and_padding_read_nothing() -> None:
    """Rows of NaN, and steps of NaN: neither reaches anything."""
    x = pack()
    start, end = OFFSETS[3], OFFSETS[4]
    for name in ("q", "k", "v", "g"):
        x[name][:, start:end] = float("nan")
    pool = torch.full((P, H, K, V), float("nan"))
    every = torch.ones(len(SLOTS), dtype=torch.bool)
    o = fla_ops.simple_gla_prefill_(**x, state=pool, slots=torch.tensor(SLOTS), fresh=every)
    assert o[:, start:end].count_nonzero() == 0
    expected, final = fla_ops.chunk_simple_gla(**without_padding(x), output_final_state=True)
    assert torch.equal(without_padding(x | {"q": o})["q"], expected)
    assert torch.equal(pool[ROWS], final)
    assert pool[[p for p in range(P) if p not in SLOTS]].isnan().all()


def test_a_prompt_in_pieces() -> None:
    """Three calls with a state in a row of a pool equal one without."""
    q, k, v, g = (pack()[name] for name in ("q", "k", "v", "g"))
    pool = torch.full((2, H, K, V), float("nan"))
    cuts = (0, 64, 128, OFFSETS[-1])
    outputs = []
    for first, last in pairwise(cuts):
        part = (x[:, first:last] for x in (q, k, v))
        fresh = torch.tensor([first == 0])
        outputs.append(fla_ops.simple_gla_prefill_(*part, pool, g[:, first:last], slots=torch.tensor([1]), fresh=fresh))
    whole, final = fla_ops.chunk_simple_gla(q, k, v, g, output_final_state=True)
    assert torch.equal(torch.cat(outputs, 1), whole)
    assert torch.equal(pool[1:], final)


def drafts() -> tuple[Tensor, Tensor, Tensor]:
    """k, v and g of four sequences with six drafted tokens each."""
    return draw(4, 6, HK, K, seed=1) * K**-0.5, draw(4, 6, H, V, seed=2), -draw(4, 6, H, seed=3).abs()


@pytest.mark.parametrize("value_first", [False, True], ids=["key-first", "value-first"])
@pytest.mark.parametrize("decay", ["g", "g_gamma", "none"])
def test_advancing_is_as_many_decode_steps(decay: str, value_first: bool) -> None:
    """Bit for bit in a float32 pool, whose other rows stay; so are the recurrent form's final states."""
    k, v, g = drafts()
    gate: dict[str, Tensor] = {"g": {"g": g}, "g_gamma": {"g_gamma": g[0, 0]}, "none": {}}[decay]
    pool = draw(P, H, *((V, K) if value_first else (K, V)))
    stepped, before = pool.clone(), pool.clone()
    accepted = (6, 0, 3, 5)
    slots = torch.tensor([7, 0, -1, 3])
    fla_ops.simple_gla_advance_(k, v, pool, torch.tensor(accepted), slots=slots, state_v_first=value_first, **gate)
    for t in range(6):
        now = gate | {name: x[:, t] for name, x in gate.items() if name == "g"}
        live = torch.where(torch.tensor(accepted) > t, slots, -1)
        fla_ops.simple_gla_step_(k[:, t], k[:, t], v[:, t], stepped, slots=live, state_v_first=value_first, **now)
    assert torch.equal(pool, stepped)
    for n, row in ((0, 7), (3, 3)):
        taken = slice(n, n + 1), slice(accepted[n])
        now = gate | {name: x[taken] for name, x in gate.items() if name == "g"}
        options = {"initial_state": before[row : row + 1], "state_v_first": value_first, "output_final_state": True}
        _, final = fla_ops.fused_recurrent_simple_gla(k[taken], k[taken], v[taken], **now, **options)
        assert torch.equal(pool[row], final[0])


@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_advancing_rounds_a_half_precision_pool_once(pool_dtype: torch.dtype) -> None:
    k, v, g = drafts()
    half = draw(4, H, K, V, dtype=pool_dtype)
    wide, accepted = half.float(), torch.tensor([6, 1, 3, 0])
    fla_ops.simple_gla_advance_(k, v, half, accepted, g)
    fla_ops.simple_gla_advance_(k, v, wide, accepted, g)
    assert torch.equal(half, wide.to(pool_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "aten"])
def test_rejected_tokens_are_not_read(dtype: torch.dtype) -> None:
    k, v, g = (x.to(dtype) for x in drafts())
    accepted = torch.tensor([2, 0, 6, 1])
    rejected = torch.arange(6) >= accepted[:, None]
    k, v, g = (x.masked_fill(rejected.reshape(4, 6, *[1] * (x.dim() - 2)), torch.nan) for x in (k, v, g))
    pool = draw(4, H, K, V).to(dtype)
    before = pool.clone()
    fla_ops.simple_gla_advance_(k, v, pool, accepted, g)
    assert not pool.isnan().any()
    assert torch.equal(pool[1], before[1])


@pytest.mark.parametrize("value_first", [False, True], ids=["key-first", "value-first"])
@pytest.mark.parametrize("threads", [1, 64], ids=["walks", "chunks"])
def test_states_are_where_a_run_may_resume(threads: int, value_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in every sequence of a pack; and the outputs are those of the chunk form."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = pack()
    initial = draw(len(SLOTS), H, *((V, K) if value_first else (K, V)))
    options: dict[str, Any] = {"state_v_first": value_first, "output_final_state": True}
    o, states, final = fla_ops.simple_gla_states(**x, initial_state=initial, state_v_first=value_first)
    expected, last = fla_ops.chunk_simple_gla(**x, initial_state=initial, **options)
    assert o is not None
    assert torch.equal(o, expected)
    assert torch.equal(final, last)
    bare = {name: y for name, y in x.items() if name != "q"}
    nothing, alone, _ = fla_ops.simple_gla_states(**bare, initial_state=initial, state_v_first=value_first)
    assert nothing is None
    assert torch.equal(alone, states)
    row = 0
    for n, (start, end) in enumerate(pairwise(OFFSETS)):
        for cut in range(start + 64, end + 1, 64):
            rest = [x[name][:, cut:end] for name in ("q", "k", "v", "g")]
            resumed, after = fla_ops.chunk_simple_gla(*rest, initial_state=states[row : row + 1], **options)
            assert torch.equal(resumed, o[:, cut:end])
            assert torch.equal(after, final[n : n + 1])
            row += 1
    assert row == 3
    assert not states[row:].any()


IN_PLACE = [
    case
    for case in cases()
    if (case.operator, case.id)
    in (("simple_gla_prefill_", "packed-with-empty-and-one-step"), ("simple_gla_advance_", "pool-with-padding"))
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_compiled_calls_update_in_place_without_a_copy(case: Any) -> None:
    inputs = case.inputs()
    expected = case.call(inputs)
    pool = inputs.pop("state")

    def layer(cache: Tensor) -> Any:
        return tuple(x + 1 for x in results(case.overload(**inputs, state=cache[1])))

    cache = torch.stack([pool, pool])
    with torch.no_grad():
        outputs, (code,) = run_and_get_code(torch.compile(layer, fullgraph=True), cache)
    for found, y in zip((*outputs, cache[1]), (*(x + 1 for x in expected[:-1]), expected[-1]), strict=True):
        assert torch.equal(found, y)
    assert torch.equal(cache[0], pool)
    copies = re.findall(r"\w*(?:clone|copy|auto_functionalized)\w*\(", code[code.index("def call(") :])
    assert not copies, f"the pool is copied by {copies}"
