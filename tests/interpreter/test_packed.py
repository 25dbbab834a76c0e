"""What kernels follow along packed sequences: the offsets, whatever values they have, and the rows of their chunks."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch

from fla_ops.common import stops
from fla_ops.common.gpu import chunk_index, offsets
from tests.contract.helpers import DEVICES, INTERPRETED

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED and "cuda" not in DEVICES, reason="needs a GPU, or TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("poisoned_memory"),
]
DEVICE = DEVICES[-1]
MANY = list(accumulate((n % 40 for n in range(1300)), initial=0))  # more than one program takes at once


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("right", [[0, 0], [0, 64], [0, 0, 3, 70, 70, 200], MANY], ids=lambda x: f"{len(x) - 1}")
def test_right_offsets_stay(right: list[int], dtype: torch.dtype) -> None:
    found = offsets.followed(torch.tensor(right, dtype=dtype, device=DEVICE), right[-1])
    assert found.tolist() == right
    assert found.dtype is torch.int64


@pytest.mark.parametrize(
    ("wrong", "time", "counted"),
    [
        ([5, 30, 100], 100, [0, 30, 100]),
        ([0, 30, 90], 100, [0, 30, 100]),
        ([0, 130, 100], 100, [0, 100, 100]),
        ([0, 60, 40, -(2**40), 2**40, 7], 100, [0, 60, 60, 60, 100, 100]),
        ([2**62, -1, -1, 3], 10, [0, 0, 0, 10]),
        ([0, 500, *range(400, 2000), 5], 1000, [0, 500, *(max(500, min(n, 1000)) for n in range(400, 2000)), 1000]),
    ],
)
def test_wrong_offsets_stay_inside(wrong: list[int], time: int, counted: list[int]) -> None:
    given = torch.tensor(wrong, device=DEVICE)
    assert offsets.followed(given, time).tolist() == counted
    assert stops.inside(given, time).tolist() == counted


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("cu_seqlens", [[0, 0], [0, 64], [0, 0, 1, 33, 33, 85], MANY], ids=lambda x: f"{len(x) - 1}")
def test_rows_of_chunks(cu_seqlens: list[int], size: int) -> None:
    found = chunk_index.build(1, cu_seqlens[-1], torch.tensor(cu_seqlens, device=DEVICE), size)
    chunks = [-(-(end - start) // size) for start, end in pairwise(cu_seqlens)]
    rows = [n for n, count in enumerate(chunks) for _ in range(count)]
    assert found.ends.tolist() == list(accumulate(chunks))
    assert found.sequence.tolist() == rows + [len(chunks)] * (found.rows - len(rows))
