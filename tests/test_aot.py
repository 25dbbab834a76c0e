"""Every entry of the launch tables, compiled for the card it is for: no spills, shared memory, precise products.

A family says in `<family>/launches.py` which calls launch each of its kernels.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton

from fla_ops import launch
from fla_ops.common.gpu import chunk_index, offsets

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from tests import aot

NO_SPILLS_FROM = (3, 7)  # of Triton: older compilers give some kernels a few registers less
LAUNCHES = {
    path.parent.name: importlib.import_module(f"tests.{path.parent.name}.launches")
    for path in sorted(Path(__file__).parent.glob("*/launches.py"))
}
CALLS: dict[str, list[Callable[[torch.dtype, int, int], None]]] = {
    kernel: calls for module in LAUNCHES.values() for kernel, calls in module.CALLS.items()
}

QUICK = ("sm_90", "gfx942")
WIDTHS = (16, 32, 64, 72, 128, 256)  # a tile has a power of two; 72 leaves a part of one empty
DTYPES = {"float32": torch.float32, "float16": torch.float16}  # bfloat16 stands for every other
MANY_HEADS = 16  # that share a key head: rows enough for Triton to take a sum of products for a matrix product


def entries() -> Iterator[Any]:
    """Every entry of the tables; in every run, the first of each kernel for two targets."""
    for target in aot.TARGETS:
        for kernel, found in launch.table(target).items():
            for position, entry in enumerate(found):
                reason = f"{target}-{kernel}-{entry['dtype']}-{entry['key_width']}-{position}"
                slow = target not in QUICK or position > 0
                yield pytest.param(target, kernel, entry, id=reason, marks=[pytest.mark.slow] * slow)


@pytest.fixture(autouse=True, scope="module")
def no_cached_kernels() -> Iterator[None]:
    with aot.private_cache():
        yield


def test_every_class_has_a_target() -> None:
    assert set(launch.CLASSES) == set(aot.TARGETS)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_kernel_of_the_tables_is_compiled(target: str) -> None:
    assert launch.table(target).keys() == CALLS.keys()


def launched(target: str, kernel: str, call: Callable[[torch.dtype, int, int], None], *sizes: Any) -> list[aot.Launch]:
    """The launches of a kernel, and of those that take their settings from its entry, in a call of these sizes."""
    with aot.launches(target) as launches:
        call(*sizes)
    others = {f"{name}_kernel" for name in CALLS} - {f"{kernel}_kernel"}
    return [x for x in launches if x.kernel.__name__ not in others]


def check(target: str, call: aot.Launch) -> None:
    """The compiled kernel spills nothing, fits, and multiplies as precisely as it says."""
    compiled = aot.compile_for(target, call)
    used, products = aot.usage(compiled), aot.products(compiled)
    if tuple(map(int, triton.__version__.split(".")[:2])) >= NO_SPILLS_FROM:
        assert used.spilled == 0, (call.kernel.__name__, used)
    assert used.shared <= aot.SHARED_LIMIT[target], (call.kernel.__name__, used)

    precision = call.constants.get("PRECISION")
    if any(isinstance(x, torch.Tensor) and x.dtype is torch.float16 for x in call.args) and precision == "ieee":
        precision = "tf32"  # of a state in float32 beside activations in float16, which have as many digits
    assert {asked for operands, asked in products.asked if operands == "f32"} <= {precision}
    units = {"ieee": "float32", "tf32": "tf32", "tf32x3": "tf32"}
    wanted = {units[asked] if operands == "f32" else "half" for operands, asked in products.asked}
    if aot.TARGETS[target].backend == "cuda":
        wanted -= {"float32"}  # whose products are no matter for matrix units there
    assert products.read == wanted
    if "tf32" in wanted:
        assert products.parts >= {"tf32": 1, "tf32x3": 3}[precision]


@pytest.mark.parametrize(("target", "kernel", "entry"), list(entries()))
def test_entry_at_its_widest(target: str, kernel: str, entry: dict[str, Any]) -> None:
    dtype = DTYPES.get(entry["dtype"], torch.bfloat16)
    for call in CALLS[kernel]:
        chosen = launched(target, kernel, call, dtype, entry["key_width"], entry["value_width"])
        assert chosen, f"{call.__name__} launches no {kernel}"
        check(target, chosen[-1])


@pytest.mark.parametrize("target", aot.TARGETS)
def test_many_heads_share_one(target: str) -> None:
    """A step of float32 for a large group multiplies in float32."""
    with mock.patch.dict(LAUNCHES["gsa"].SIZES, query_heads=MANY_HEADS, heads=1):
        (call,) = launched(target, "gsa_decoding", LAUNCHES["gsa"].step, torch.float32, 64, 64)
    check(target, call)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_packed_sequences_are_found_by_two_kernels(target: str) -> None:
    cu_seqlens = torch.tensor([0, 30, 100])
    with aot.launches(target) as launches:
        chunk_index.build(1, 100, offsets.followed(cu_seqlens, 100), 64)
    assert [call.kernel.__name__ for call in launches] == ["offsets_kernel", "chunk_index_kernel"]
    for call in launches:
        check(target, call)


def wrong_with(target: str, call: aot.Launch) -> str:
    """What `check` finds, or nothing."""
    try:
        check(target, call)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.exhaustive
@pytest.mark.parametrize("kernel", CALLS)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_tile(target: str, kernel: str) -> None:
    """All pairs of widths and all dtypes, heads grouped or not: each tile that a launch can have, compiled once."""
    family = next(module for module in LAUNCHES.values() if kernel in module.CALLS)
    heads = [name for name in family.SIZES if "heads" in name]
    tiles: dict[tuple[Any, ...], aot.Launch] = {}
    for sizes in (family.SIZES, family.SIZES | dict.fromkeys(heads, 4)):
        for dtype, *widths in product((torch.float32, torch.bfloat16, torch.float16), WIDTHS, WIDTHS):
            for call in CALLS[kernel]:
                with mock.patch.dict(family.SIZES, sizes):
                    chosen = launched(target, kernel, call, dtype, *widths)
                tiles |= {aot.shape_of(x): x for x in chosen if aot.shape_of(x) not in tiles}
    failed = [f"{tile.constants}: {reason}" for tile in tiles.values() if (reason := wrong_with(target, tile))]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("kernel", CALLS)
def test_lengths_share_one_compilation(kernel: str) -> None:
    """Another batch, length or pool compiles nothing: no specialisation depends on them."""
    family = next(module for module in LAUNCHES.values() if kernel in module.CALLS)
    for call in CALLS[kernel]:
        found = []
        for batch, time in ((2, 256), (3, 75)):
            one_length = {"time": time} if call is family.step else {"batch": batch, "time": time}
            with mock.patch.dict(family.SIZES, one_length):
                found.append([aot.specialise(x) for x in launched("sm_90", kernel, call, torch.bfloat16, 64, 64)])
        assert found[0] == found[1]


def test_caches_of_other_lengths_share_one_compilation() -> None:
    """Whose heads lie apart by as many elements as a head's cache has."""
    attn, found = LAUNCHES["attn"], []
    for time in (256, 75):
        cache = torch.zeros(1, 2, time, 64).transpose(1, 2)
        real = attn.call
        with (
            mock.patch.dict(attn.SIZES, time=time),
            mock.patch.object(attn, "call", lambda *sizes, real=real, x=cache: real(*sizes)._replace(k=x, v=x)),
        ):
            chosen = launched("sm_90", "attn_decoding", attn.step, torch.float32, 64, 64)
        found.append([aot.specialise(x) for x in chosen])
    assert found[0] == found[1]
