"""Every entry of the launch tables, compiled for the card it is for: no spills, shared memory, matrix units.

A family says in `<family>/launches.py` which calls launch each of its kernels.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from fla_ops import launch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from tests import aot

NO_SPILLS_FROM = (3, 7)  # of Triton: older compilers give some kernels a few registers less
CALLS: dict[str, list[Callable[[torch.dtype, int, int], None]]] = {}
for path in sorted(Path(__file__).parent.glob("*/launches.py")):
    CALLS |= importlib.import_module(f"tests.{path.parent.name}.launches").CALLS

QUICK = ("sm_90", "gfx942")  # of which `make test` compiles the first entry of each kernel
ENTRIES = [
    pytest.param(
        target,
        kernel,
        entry,
        id=f"{target}-{kernel}-{entry['dtype']}-{entry['key_width']}-{position}",
        marks=[pytest.mark.slow] * (target not in QUICK or position > 0),
    )
    for target in aot.TARGETS
    for kernel, entries in launch.table(target).items()
    for position, entry in enumerate(entries)
    if kernel in CALLS
]


@pytest.fixture(autouse=True, scope="module")
def no_cached_kernels() -> Iterator[None]:
    with aot.private_cache():
        yield


def test_every_class_has_a_target() -> None:
    assert set(launch.CLASSES) == set(aot.TARGETS)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_kernel_of_the_tables_is_compiled(target: str) -> None:
    assert launch.table(target).keys() == CALLS.keys()


@pytest.mark.parametrize(("target", "kernel", "entry"), ENTRIES)
def test_entry(target: str, kernel: str, entry: dict[str, Any]) -> None:
    dtype = torch.float32 if entry["dtype"] == "float32" else torch.bfloat16
    for call in CALLS[kernel]:
        with aot.launches(target) as launches:
            call(dtype, entry["key_width"], entry["value_width"])
        chosen = [x for x in launches if x.kernel.__name__ == f"{kernel}_kernel"]
        assert chosen, f"{call.__name__} launches no {kernel}"
        used = aot.usage(aot.compile_for(target, chosen[-1]))
        if tuple(map(int, triton.__version__.split(".")[:2])) >= NO_SPILLS_FROM:
            assert used.spilled == 0, used
        assert used.shared <= aot.SHARED_LIMIT[target], used
        if entry["dtype"] == "half":  # kernels that multiply no matrices have entries for any dtype
            assert used.tensor_core, used
