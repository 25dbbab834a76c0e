"""gsa for servers, bit for bit: prefill is the chunk form on rows of the pools, advancing is as many decode steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fla_ops

P, HQ, H, K, V, M = 9, 6, 3, 10, 7, 8
OFFSETS = (0, 40, 41, 41, 60, 110)  # ragged, one token, empty, padding, more than one chunk
SLOTS = (7, 0, 3, -1, 5)
USED = [n for n, row in enumerate(SLOTS) if row >= 0]
ROWS = [SLOTS[n] for n in USED]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def sequences(*lead: int) -> dict[str, Tensor]:
    """q, k, v, s and g."""
    q, k, v = draw(*lead, HQ, K, seed=1), draw(*lead, H, K, seed=2), draw(*lead, H, V, seed=3)
    return {"q": q, "k": k * K**-0.5, "v": v, "s": draw(*lead, H, M, seed=4), "g": -draw(*lead, H, M, seed=5).abs()}


def pools(value_first: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Both pools."""
    turn = -1 if value_first else 1
    shapes = {"state_k": (K, M)[::turn], "state_v": (M, V)[::turn]}
    return {name: draw(P, H, *shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("value_first", [False, True], ids=["key-first", "value-first"])
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill_is_the_chunk_form_on_rows_of_the_pools(pool_dtype: torch.dtype, value_first: bool) -> None:
    """Rows that no slot names keep their bits, and padding reads nothing, NaN included."""
    x = sequences(1, OFFSETS[-1])
    start, end = OFFSETS[3:5]
    for y in x.values():
        y[:, start:end] = torch.nan
    updated = pools(value_first, pool_dtype)
    for pool in updated.values():
        pool[SLOTS[4]] = torch.nan
    before = {name: pool.clone() for name, pool in updated.items()}
    fresh = torch.tensor([False, False, False, False, True])
    o = fla_ops.gsa_prefill_(
        **x, **updated, slots=torch.tensor(SLOTS), fresh=fresh, state_v_first=value_first,
        cu_seqlens=torch.tensor(OFFSETS),
    )  # fmt: skip

    lengths = torch.tensor(OFFSETS).diff()
    kept = torch.repeat_interleave(torch.tensor(SLOTS) >= 0, lengths)
    offsets = torch.nn.functional.pad(lengths[USED].cumsum(0), (1, 0))
    initial = [pool[ROWS].masked_fill(fresh[USED, None, None, None], 0) for pool in before.values()]
    initial = [y.mT if value_first else y for y in initial]
    expected, final = fla_ops.chunk_gsa(
        **{name: y[:, kept] for name, y in x.items()},
        initial_state=(initial[0], initial[1]), output_final_state=True, cu_seqlens=offsets,
    )  # fmt: skip
    assert torch.equal(o[:, kept], expected)
    assert not o[:, ~kept].any()
    others = [p for p in range(P) if p not in SLOTS]
    for (name, pool), state in zip(updated.items(), final, strict=True):
        assert torch.equal(pool[ROWS], (state.mT if value_first else state).to(pool_dtype))
        assert torch.equal(pool[others], before[name][others])


@pytest.mark.parametrize("value_first", [False, True], ids=["key-first", "value-first"])
def test_advancing_is_as_many_decode_steps(value_first: bool) -> None:
    x, accepted, slots = sequences(4, 6), torch.tensor([6, 0, 3, 5]), torch.tensor([7, 0, -1, 3])
    rejected = torch.arange(6) >= accepted[:, None]
    drafted = {name: y.masked_fill(rejected[..., None, None], torch.nan) for name, y in x.items() if name != "q"}
    updated, stepped = pools(value_first), pools(value_first)
    fla_ops.gsa_advance_(**drafted, **updated, accepted=accepted, slots=slots, state_v_first=value_first)
    for t in range(6):
        live = torch.where(accepted > t, slots, -1)
        now = {name: y[:, t] for name, y in x.items()}
        fla_ops.gsa_step_(**now, **stepped, slots=live, state_v_first=value_first)
    for name, pool in updated.items():
        assert torch.equal(pool, stepped[name])


def test_states_are_where_a_run_may_resume() -> None:
    """Bit for bit after whole chunks, in every sequence of a pack, in any order; o is that of the chunk form."""
    offsets, at = torch.tensor((0, 70, 70, 200)), torch.tensor([[64, 0, -1], [1, 0, 0], [128, 65, 64]])
    x = sequences(1, 200)
    initial = draw(3, H, K, M), draw(3, H, M, V)
    given = {"initial_state": initial, "cu_seqlens": offsets}
    o, states, final = fla_ops.gsa_states(**x, **given, at=at)
    expected, last = fla_ops.chunk_gsa(**x, **given, output_final_state=True)
    assert o is not None
    assert torch.equal(o, expected)
    every = fla_ops.gsa_states(**{name: y for name, y in x.items() if name != "q"}, **given)
    assert every[0] is None
    for stopped, kept, first, end, whole in zip(states, every[1], initial, final, last, strict=True):
        assert torch.equal(end, whole)
        assert torch.equal(stopped[:2, 1], first[:2])
        assert torch.equal(torch.stack([stopped[0, 0], stopped[2, 2], stopped[2, 0]]), kept)
        assert not stopped[0, 2].any()
        assert not stopped[1, 0].any()
    start = (states[0][2, :1], states[1][2, :1])
    resumed, after = fla_ops.chunk_gsa(
        **{name: y[:, 198:] for name, y in x.items()}, initial_state=start, output_final_state=True
    )
    assert torch.equal(resumed, o[:, 198:])
    for y, z in zip(after, final, strict=True):
        assert torch.equal(y[0], z[2])
