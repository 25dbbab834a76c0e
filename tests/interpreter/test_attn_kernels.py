"""attn's kernels under Triton's interpreter with small tiles: several of every kind, and parts that must join."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

import fla_ops
from fla_ops import launch
from fla_ops.attn import reference
from tests import numerics
from tests.attn.cases import packed
from tests.cases import Case, cases
from tests.contract import test_numbers
from tests.contract.helpers import INTERPRETED

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before Triton is imported"),
]

TILES = {
    "attn_forward": {"BM": 32, "BN": 16},
    "attn_query_gradient": {"BM": 32, "BN": 16},
    "attn_key_gradient": {"BM": 16, "BN": 32},
    "attn_decay_sums": {"BT": 16},
    "attn_decay_gradient": {"BT": 16},
    "attn_row_terms": {"BM": 16},
    "attn_decoding": {"SPLIT": 32, "BN": 16},
    "attn_join": {"BS": 2},
}


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Launch settings that cut short inputs into many tiles."""
    real = launch.entry

    def entry(kernel: str, x: Tensor, key_width: int, value_width: int) -> launch.Entry:
        return real(kernel, x, key_width, value_width) | TILES.get(kernel, {})

    with mock.patch.object(launch, "entry", entry):
        yield


def scenario(operator: str, name: str) -> Case:
    """A case by its id."""
    return next(case for case in cases(operator) if case.id == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["everything", "strong-decay", "window-of-a-block"])
def test_tiles_of_every_kind(name: str, dtype: torch.dtype) -> None:
    case = scenario("parallel_attn", name).resized(B=1, T=101, H=1, HQ=3)
    test_numbers.check_numbers(case, "cpu", dtype)


def test_packed_sequences_of_several_tiles() -> None:
    case = scenario("parallel_attn", "packed-with-empty-and-one-step").resized(offsets=(0, 0, 50, 51, 116), H=1, HQ=2)
    test_numbers.check_numbers(case, "cpu", torch.float32)


@pytest.mark.parametrize("name", ["everything", "strong-decay", "capped", "strong-decay-past-all-keys"])
def test_fewer_queries_than_keys(name: str) -> None:
    case = scenario("attn_prefill", name).resized(B=1, T=50, TK=101, H=1, HQ=3)
    test_numbers.check_numbers(case, "cpu", torch.float32)


@pytest.mark.parametrize("name", ["packed", "packed-past-all-keys"])
def test_packed_queries_and_keys_of_several_tiles(name: str) -> None:
    sizes = packed((0, 0, 35, 36, 75), (3, 40, 0, 50))
    test_numbers.check_numbers(scenario("attn_prefill", name).resized(H=1, HQ=2, **sizes), "cpu", torch.float32)


@pytest.mark.parametrize("name", ["everything", "strong-decay", "plain"])
def test_caches_of_several_parts(name: str) -> None:
    case = scenario("attn_decoding_one_step", name).resized(offsets=(0, 101, 101, 102, 172))
    test_numbers.check_numbers(case, "cpu", torch.float32)


def test_a_cache_is_not_copied_for_its_strides() -> None:
    """[1, H, T, K] seen as [1, T, H, K], as caches are often laid out."""
    case = scenario("attn_decoding_one_step", "everything")
    inputs = case.inputs()
    expected = fla_ops.attn_decoding_one_step(**inputs)
    for name in ("k", "v"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(fla_ops.attn_decoding_one_step(**inputs), expected)


def test_long_running_sums_keep_their_digits() -> None:
    """Sums of thousands, of which only differences near one count."""
    time = 160
    g = torch.full((1, time, 1), -1.0)
    g[:, ::10] = -900.0
    q, k, v = (torch.randn(1, time, 1, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    truth, _ = reference.parallel(q.double(), k.double(), v.double(), g.double())
    assert numerics.error(fla_ops.parallel_attn(q, k, v, g), truth) < 5e-7
