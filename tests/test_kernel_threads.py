"""The threads of a CPU's kernels: PyTorch's own, from the one OpenMP runtime of a process."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fla_ops.common.cpu import build
from tests.contract.helpers import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter serves the CPU")

# Every OpenMP runtime is called so: GCC's, Clang's, Intel's; wheels put a digest into the name.
RUNTIME = re.compile(r"/lib[gi]?omp\d*[-.][^/]*$")

RUNTIMES = """
import torch, fla_ops
from pathlib import Path

torch.set_num_threads(2)
x = torch.ones(1, 300, 4, 64)
fla_ops.chunk_simple_gla(x, x, x)
print(*{line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}, sep="\\n")
"""


def test_a_process_that_ran_a_kernel_has_one_openmp_runtime() -> None:
    done = subprocess.run([sys.executable, "-c", RUNTIMES], check=True, capture_output=True, text=True)
    found = [path for path in done.stdout.splitlines() if RUNTIME.search(path)]
    assert len(found) == 1, found


@pytest.mark.parametrize("source", build.sources())
def test_a_library_names_no_openmp_runtime(source: str, tmp_path: Path) -> None:
    """PyTorch's may have another name than the compiler's: a library that depended on either would load a second."""
    build._compile(build._text(source), build.FLAGS, tmp_path / "kernels.so")
    assert not re.search(rb"lib[gi]?omp|GOMP_|__kmpc", (tmp_path / "kernels.so").read_bytes())


TEAM = """
#include <cstring>
#include "common/cpu/threads.h"

extern "C" {
void run(int64_t threads, int64_t count, int64_t* by_thread, int64_t* met) {
    std::atomic<int64_t> next{0}, arrived{0};
    with_team(threads, [&] {
        share(count, [&](int64_t i) { by_thread[i] = team.thread; });
        arrived++;
        meet();
        share_as_they_come(next, count, [&](int64_t i) { met[i] += arrived; });
    });
}
}
"""


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_team_shares_the_work_among_its_threads(threads: int, tmp_path: Path) -> None:
    path = tmp_path / "team.so"
    header = build._text("common/cpu/threads.h")
    build._compile(TEAM.replace('#include "common/cpu/threads.h"', header), build.FLAGS, path)
    library = ctypes.CDLL(str(path))
    library.use_threads(ctypes.byref(build._runtime()))
    by_thread, met = torch.full((100,), -1), torch.zeros(100, dtype=torch.int64)
    count = ctypes.c_int64(100)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (by_thread, met))
    library.run(ctypes.c_int64(threads), count, *pointers)
    assert by_thread.tolist() == sorted(by_thread.tolist())
    assert set(by_thread.tolist()) == set(range(threads))
    assert met.eq(threads).all()


def test_without_a_runtime_one_thread_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert build.threads(build.TOGETHER) == 2
    assert build.threads(build.TOGETHER - 1) == 1
    monkeypatch.setattr(build, "_runtime", build.Runtime)
    assert build.threads(build.TOGETHER) == 1
