"""Compiled kernels of a CPU on disk: what is damaged, what does not compile, who compiles, and what a user is told."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fla_ops.common.cpu import build, cache
from tests.contract.helpers import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter serves the CPU")

COMPILER = os.environ.get("CXX") or "c++"
SOURCES = ("linear_attn/cpu/normalize.cpp", "simple_gla/cpu/chunk.cpp", "simple_gla/cpu/recurrent.cpp")
OPERATORS = ("normalize_output", "chunk_simple_gla", "fused_recurrent_simple_gla")  # one for each source

TWICE = """
import sys, warnings
import torch, fla_ops
from fla_ops.common.cpu import build

build.LIMIT = float(sys.argv[1])
x = torch.ones(1, 70, 2, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for operator in 2 * sys.argv[2:]:
        o = getattr(torch.ops.fla, operator)(x, x, x)[0]
        assert o.isfinite().all()
print(*(str(w.message) for w in caught if "fla_ops" in str(w.message)), sep="\\0")
"""


def warned(
    folder: Path | str,
    compiler: str = COMPILER,
    operators: tuple[str, ...] = OPERATORS[:1],
    limit: float = 100,
    **more: str,
) -> list[str]:
    """What a new process warns of that calls operators, twice each, and keeps compiled kernels in a folder."""
    environment = os.environ | {"FLA_OPS_CACHE_DIR": str(folder), "CXX": compiler} | more
    command = [sys.executable, "-c", TWICE, str(limit), *operators]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("\0") if done.stdout.strip() else []


def script(path: Path, *lines: str) -> str:
    """A compiler of ours."""
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return shlex.quote(str(path))


@pytest.fixture
def counting(tmp_path: Path) -> tuple[str, Callable[[], int]]:
    """A compiler that counts its runs."""
    log = tmp_path / "runs"
    log.touch()
    name = script(tmp_path / "counting", f"echo run >> {shlex.quote(str(log))}", f'exec {COMPILER} "$@"')
    return name, lambda: len(log.read_text().splitlines())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one call of normalize_output keeps."""
    folder = tmp_path_factory.mktemp("kept")
    assert warned(folder) == []
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that exports one function."""
    return link(tmp_path_factory.mktemp("small") / "small.so", 'extern "C" int answer() { return 42; }')


def link(path: Path, text: str) -> Path:
    command = [*shlex.split(COMPILER), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=text, text=True, check=True)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this process."""
    monkeypatch.setenv("FLA_OPS_CACHE_DIR", str(tmp_path / "cache"))
    return cache.home()


# A process with a builder that notes its runs in a log. The module is loaded alone: it does not need PyTorch.
ALONE = """
import importlib.util, os, shutil, signal, sys, time

module, small, log, mode = sys.argv[1:]
spec = importlib.util.spec_from_file_location("cache", module)
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
notes = []

def build(path):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    with open(log) as file:
        first = len(file.readlines()) == 1
    if mode == "dies" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    shutil.copy(small, path)

print(cache.obtain("some.so", ["answer"], build, notes).answer(), *notes)
"""


class Alone:
    """Processes that obtain some.so in the cache folder of this one."""

    def __init__(self, small: Path, folder: Path) -> None:
        self.small, self.log = small, folder.with_name("log")
        self.log.touch()

    def start(self, mode: str = "lives") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", ALONE, cache.__file__, str(self.small), str(self.log), mode]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def said(self) -> str:
        """What one more prints: the answer, and the notes."""
        return self.start().communicate(timeout=100)[0].strip()

    def builds(self) -> int:
        return len(self.log.read_text().splitlines())


@pytest.fixture
def alone(folder: Path, small: Path) -> Alone:
    return Alone(small, folder)


def sealed(path: Path, data: bytes) -> None:
    path.write_bytes(data + cache._seal(path.name, data))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated-to-a-page": lambda data: data[:4096],
    "truncated-by-a-byte": lambda data: data[:-1],
    "zeroed-at-the-end": lambda data: data[:4096] + bytes(len(data) - 4096),
    "zeroed-throughout": lambda data: bytes(len(data)),
    "one-bit": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "empty": lambda _: b"",
    "foreign": lambda _: b"<html>not found</html>",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_never_opened_and_built_once_more(
    damage: str, folder: Path, small: Path, alone: Alone
) -> None:
    path = folder / "some.so"
    sealed(path, small.read_bytes())
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert alone.said().startswith(f"42 {path} was damaged")
    assert alone.said() == "42"
    assert alone.builds() == 1
    assert list(folder.iterdir()) == [path]


def test_a_damaged_kernel_is_compiled_once_more_and_named(
    kept: Path, tmp_path: Path, counting: tuple[str, Callable[[], int]]
) -> None:
    compiler, runs = counting
    path = tmp_path / "cache" / kept.name
    path.parent.mkdir()
    path.write_bytes(kept.read_bytes()[:4096])
    (message,) = warned(path.parent, compiler)
    assert message.startswith(f"fla_ops/{SOURCES[0]} had to be compiled: {path} was damaged")
    assert warned(path.parent, compiler) == []
    assert runs() == 1
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_library_without_a_compiler_is_named_beside_it(kept: Path, tmp_path: Path) -> None:
    (tmp_path / kept.name).write_bytes(b"")
    (message,) = warned(tmp_path, "no-such-compiler")
    assert "was damaged (it was empty)" in message
    assert "there is no C++ compiler 'no-such-compiler'" in message


def test_one_library_does_not_pass_for_another(folder: Path, small: Path) -> None:
    cache.obtain("one.so", ["answer"], lambda path: shutil.copy(small, path), [])
    shutil.copy(folder / "one.so", folder / "other.so")
    notes: list[str] = []
    cache.obtain("other.so", ["answer"], lambda path: shutil.copy(small, path), notes)
    assert re.search(r"other\.so was damaged", notes[0])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param('int absent(); extern "C" int answer() { return absent(); }', "does not load", id="does-not-load"),
        pytest.param('extern "C" int question() { return 6 * 9; }', "does not export answer", id="lacks-a-symbol"),
    ],
)
def test_a_kept_library_that_cannot_serve_is_built_once_more(
    text: str, why: str, folder: Path, tmp_path: Path, alone: Alone
) -> None:
    sealed(folder / "some.so", link(tmp_path / "wrong.so", text).read_bytes())
    assert re.fullmatch(f"42 .*some.so could not be used .*{why}.*", alone.said())
    assert alone.said() == "42"
    assert alone.builds() == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        pytest.param("-nostdlib", "the library does not load: ", id="unresolved"),
        pytest.param("-fvisibility=hidden", "the library does not export use_threads, normalize_forward", id="hidden"),
    ],
)
def test_what_does_not_load_is_not_kept(options: str, why: str, tmp_path: Path) -> None:
    (message,) = warned(tmp_path, f"{COMPILER} {options}")
    assert message.startswith(f"fla_ops/{SOURCES[0]} is served by ATen calls, more slowly: {why}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        pytest.param(None, "there is no C++ compiler", id="no-compiler"),
        pytest.param(["echo too old >&2", "exit 3"], "ended with status 3\ntoo old", id="fails"),
        pytest.param(["exit 0"], "the compiler ended well but wrote no library", id="writes-nothing"),
    ],
)
def test_why_nothing_compiled_is_said_once_for_each_file(lines: list[str] | None, why: str, tmp_path: Path) -> None:
    compiler = str(tmp_path / "absent") if lines is None else script(tmp_path / "compiler", *lines)
    said = warned(tmp_path / "cache", compiler, OPERATORS)
    assert len(said) == len(SOURCES), said
    for source, message in zip(SOURCES, said, strict=True):
        assert message.startswith(f"fla_ops/{source} is served by ATen calls")
        assert why in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    compiler = script(tmp_path / "compiler", "sleep 600 &", f"echo $! > {shlex.quote(str(tmp_path / 'child'))}", "wait")
    (message,) = warned(tmp_path / "cache", compiler, limit=1)
    assert "had not finished after 1 s, and was stopped" in message
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_was_compiled_serves_without_a_compiler(tmp_path: Path) -> None:
    assert warned(tmp_path) == []
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]
    assert warned(tmp_path, "no-such-compiler") == []


@pytest.mark.parametrize("place", ["exists", "cannot-be-made"])
def test_a_folder_that_cannot_be_written_is_said_and_leaves_nothing(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    folder = "/proc/self" if place == "exists" else tmp_path / "file" / "folder"  # root cannot write there either
    (message,) = warned(folder, TMPDIR=str(tmp_path / "temporary"))
    assert message.startswith(f"fla_ops/{SOURCES[0]} had to be compiled: no library can be kept, but for this process")
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_full_disk_is_not_the_compilers_failure(folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, notes = os.posix_fallocate, []

    def full(file: int, start: int, length: int) -> None:
        if Path(f"/proc/self/fd/{file}").readlink().is_relative_to(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(file, start, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    library = cache.obtain("some.so", ["answer"], lambda path: shutil.copy(small, path), notes)
    assert library.answer() == 42
    assert "No space left on device" in notes[0]
    assert list(folder.iterdir()) == []


def test_a_kept_library_serves_from_a_folder_that_cannot_be_written(
    folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed(folder / "some.so", small.read_bytes())

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(cache, "_alone", read_only)
    monkeypatch.setattr(cache, "_build", read_only)
    notes: list[str] = []
    assert cache.obtain("some.so", ["answer"], read_only, notes).answer() == 42
    assert notes == []


def test_a_user_without_a_home_still_has_kernels(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home directory")

    for name in ("FLA_OPS_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    notes: list[str] = []
    library = cache.obtain("some.so", ["answer"], lambda path: shutil.copy(small, path), notes)
    assert library.answer() == 42
    assert "no home directory" in notes[0]


@pytest.mark.parametrize(("mode", "builds"), [("lives", 1), ("dies", 2)])
def test_one_of_eight_processes_builds_and_the_others_wait(mode: str, builds: int, folder: Path, alone: Alone) -> None:
    processes = [alone.start(mode) for _ in range(8)]
    said = [process.communicate(timeout=100)[0].strip() for process in processes]
    assert alone.builds() == builds
    assert sorted(said) == [""] * (builds - 1) + ["42"] * (9 - builds)
    assert [path.name for path in folder.iterdir()] == ["some.so"]


def test_a_process_that_is_stopped_while_it_builds_holds_nobody_up_for_ever(
    folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = "file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); input()"
    command = [sys.executable, "-c", f"import fcntl, sys; {hold}", str(folder / "some.so.lock")]
    monkeypatch.setattr(cache, "WAIT", 0.1)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        notes: list[str] = []
        library = cache.obtain("some.so", ["answer"], lambda path: shutil.copy(small, path), notes)
        process.communicate("\n")
    assert library.answer() == 42
    assert "another process has held" in notes[0]


def test_threads_of_one_process_compile_once(
    folder: Path, counting: tuple[str, Callable[[], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, runs = counting
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(build, "_load", build._load.__wrapped__)  # its results are those of another folder
    build._find.cache_clear()
    threads = [threading.Thread(target=build.library, args=SOURCES[:1]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs() == 1
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def test_every_source_of_the_package_is_warmed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {path.relative_to(build.PACKAGE).as_posix() for path in build.PACKAGE.rglob("*.cpp")}
    assert set(build.sources()) == found
    asked: list[str] = []
    monkeypatch.setattr(build, "library", asked.append)
    assert build.warm() == dict.fromkeys(found, False)
    assert set(asked) == found


@pytest.mark.parametrize("source", build.sources())
def test_what_a_source_exports_is_known(source: str) -> None:
    exported = build.exports(build._text(source))
    assert "use_threads" in exported
    assert len(exported) > 1
    library = build.library(source)
    assert all(hasattr(library, name) for name in exported)
