"""The C++ kernels of a CPU on another processor's emulator: `pytest -p tests.emulation` runs any test that way.

A kernel is compiled with `EMULATED_CXX` into a program that `EMULATOR` runs. Each call sends it the arguments and the
tensors that they point into, and takes the tensors back. Threads stay one: the program has no runtime to share.
"""

from __future__ import annotations

import ctypes
import gc
import os
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fla_ops.common.cpu import build

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-static")

# Reads the function's number, an integer and the arguments, then the tensors' storages, then for each pointer in the
# arguments: where it lies there, which storage it points into, and how far.
PROGRAM = """
#include <cstdio>
#include <cstdlib>

template <typename T> static T next() {
    T x;
    if (fread(&x, sizeof x, 1, stdin) != 1) exit(2);
    return x;
}

int main() {
    void* const functions[] = {%s};
    void* function = functions[next<int64_t>()];
    const int integer = int(next<int64_t>());
    auto block = [] {
        std::vector<char> bytes(next<int64_t>());
        if (fread(bytes.data(), 1, bytes.size(), stdin) != bytes.size()) exit(2);
        return bytes;
    };
    std::vector<char> arguments = block();
    std::vector<std::vector<char>> storages(next<int64_t>());
    for (auto& storage : storages) storage = block();
    for (int64_t n = next<int64_t>(); n > 0; n--) {
        const int64_t place = next<int64_t>(), number = next<int64_t>(), distance = next<int64_t>();
        const char* target = storages[number].data() + distance;
        memcpy(arguments.data() + place, &target, sizeof target);
    }
    const int64_t result = reinterpret_cast<int64_t (*)(void*, int)>(function)(arguments.data(), integer);
    fwrite(&result, sizeof result, 1, stdout);
    for (auto& storage : storages) fwrite(storage.data(), 1, storage.size(), stdout);
    return fflush(stdout);
}
"""


class Library:
    """A compiled source file, with its functions as attributes."""

    def __init__(self, source: str) -> None:
        text = build._text(source)
        self.functions = build.exports(text)
        self.program = Path(tempfile.mkdtemp()) / Path(source).stem
        program = text + PROGRAM % ", ".join(f"(void*){name}" for name in self.functions)
        command = [os.environ.get("EMULATED_CXX", COMPILER), *FLAGS, "-x", "c++", "-", "-o", str(self.program)]
        done = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)

    def __getattr__(self, name: str) -> Callable[..., int]:
        number = self.functions.index(name)

        def call(arguments: Any, integer: int = 0) -> int:
            return self.run(number, arguments._obj, integer)

        return call

    def run(self, number: int, arguments: ctypes.Structure, integer: int) -> int:
        """One call; the tensors are as it leaves them."""
        storages: dict[int, int] = {}  # bytes by address
        pointers = []
        known = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors()}
        for place, target in pointers_in(arguments):
            start = next(a for a, size in known.items() if a <= target < a + max(size, 1))
            storages.setdefault(start, known[start])
            pointers.append((place, list(storages).index(start), target - start))
        blocks = [bytes(arguments), *(ctypes.string_at(*storage) for storage in storages.items())]
        first, *others = (struct.pack("<q", len(block)) + block for block in blocks)
        sent = [struct.pack("<qq", number, integer), first, struct.pack("<q", len(others)), *others]
        sent += [struct.pack("<q", len(pointers)), *(struct.pack("<qqq", *pointer) for pointer in pointers)]
        emulator = os.environ.get("EMULATOR", EMULATOR)
        done = subprocess.run([emulator, self.program], input=b"".join(sent), capture_output=True, check=True)
        (result,) = struct.unpack_from("<q", done.stdout)
        place = 8
        for start, size in storages.items():
            ctypes.memmove(start, done.stdout[place : place + size], size)
            place += size
        assert place == len(done.stdout)
        return int(result)


def tensors() -> Iterator[Tensor]:
    """Every tensor of this process that has a storage."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        for x in gc.get_objects():
            if issubclass(type(x), Tensor) and x.layout is torch.strided and x.device.type == "cpu":
                yield x


def pointers_in(arguments: ctypes.Structure, at: int = 0) -> Iterator[tuple[int, int]]:
    """Where the arguments hold a pointer that is not null, and where to."""
    fields = (field for cls in reversed(type(arguments).mro()) for field in vars(cls).get("_fields_", ()))
    for name, kind in fields:
        value, place = getattr(arguments, name), at + getattr(type(arguments), name).offset
        if isinstance(value, ctypes.Structure):
            yield from pointers_in(value, place)
        elif kind is ctypes.c_void_p and value:
            yield place, value


def pytest_configure() -> None:
    """Every kernel is the emulator's from here on."""
    torch.set_num_threads(1)
    build._load = cache(Library)


def pytest_report_header() -> str:
    """Which processor that is."""
    return f"C++ kernels: by {os.environ.get('EMULATED_CXX', COMPILER)}, on {os.environ.get('EMULATOR', EMULATOR)}"
