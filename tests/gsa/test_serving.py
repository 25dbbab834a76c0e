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
