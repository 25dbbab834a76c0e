"""A folder of compiled libraries, which processes share and any of them may die in.

A library is opened only if the seal at its end is right: mapping a truncated one would kill the process. It is built by
one process, under a lock, while others wait; and it is kept only after it has been opened.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

WAIT = 300.0  # seconds for another process to build a library
ROOM = 4 << 20  # bytes that a library needs on a disk, at most
SEAL = hashlib.sha256().digest_size


class Unusable(Exception):
    """A library that cannot be had; the text says why."""


def obtain(name: str, symbols: Sequence[str], build: Callable[[Path], None], notes: list[str]) -> ctypes.CDLL:
    """The library that is kept as `name` and exports `symbols`, or the one that `build` writes to a path.

    Why it had to be built is added to `notes`, unless it is only that none was kept. Raises Unusable, also for `build`.
    """
    try:
        folder = home()
        if library := _kept(folder / name, symbols, notes):
            return library
        with _alone(folder / f"{name}.lock"):
            if library := _kept(folder / name, symbols, []):  # another process has built it
                notes.clear()
                return library
            return _build(folder, name, symbols, build)
    except (OSError, RuntimeError) as error:
        notes.append(f"no library can be kept, but for this process alone ({error})")
    with tempfile.TemporaryDirectory(prefix="fla_ops_") as alone:  # a library outlives its file, once it is open
        return _build(Path(alone), name, symbols, build)


def home() -> Path:
    """The folder, which is made where it is missing. A user may have no home: a RuntimeError."""
    named, caches = os.environ.get("FLA_OPS_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(named) if named else Path(caches or Path.home() / ".cache") / "fla_ops"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


def _kept(path: Path, symbols: Sequence[str], notes: list[str]) -> ctypes.CDLL | None:
    """The library at a path; None, and why, where it is damaged or does not load."""
    try:
        data = path.read_bytes()
        if data[-SEAL:] == _seal(path.name, data[:-SEAL]):
            return _open(path, symbols)
        notes.append(f"{path} was damaged ({'it does not end as it was written' if data else 'it was empty'})")
    except FileNotFoundError:
        pass
    except (OSError, Unusable) as error:
        notes.append(f"{path} could not be used ({error})")
    return None


def _build(folder: Path, name: str, symbols: Sequence[str], build: Callable[[Path], None]) -> ctypes.CDLL:
    """Build a library inside a folder of its own, open it, and only then put it in place."""
    for abandoned in folder.glob(f"{name}.*.building"):  # by a process that died; the lock says that none is at work
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{name}.", suffix=".building") as place:
        built = Path(place) / name
        with built.open("wb") as file:  # a full disk shows here, and not as a compiler's failure
            os.posix_fallocate(file.fileno(), 0, ROOM)
        built.unlink()
        build(built)
        if not built.exists():
            raise Unusable("the compiler ended well but wrote no library")
        library = _open(built, symbols)
        seal = _seal(name, built.read_bytes())
        with built.open("ab") as file:
            file.write(seal)
        built.replace(folder / name)
        return library


def _open(path: Path, symbols: Sequence[str]) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unusable(f"the library does not load: {error}") from error
    if missing := [name for name in symbols if not hasattr(library, name)]:
        raise Unusable(f"the library does not export {', '.join(missing)}")
    return library


def _seal(name: str, data: bytes) -> bytes:
    """What a library ends with; with its name, since another library in its place is as bad as a damaged one."""
    return hashlib.sha256(name.encode() + b"\0" + data).digest()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock, which the system takes from a process that dies. A TimeoutError where another holds it past WAIT."""
    until = time.monotonic() + WAIT
    while True:
        with path.open("ab") as file:
            if _lock(file.fileno()) and _is_at(path, file.fileno()):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        if time.monotonic() > until:
            raise TimeoutError(f"another process has held {path} for {WAIT:.0f} s")
        time.sleep(0.02)


def _lock(file: int) -> bool:
    """Not flock's kind, which a process that was forked meanwhile would go on holding."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # either one means that another process has it
        return False
    return True


def _is_at(path: Path, file: int) -> bool:
    """Whether an open file is the one at a path: its last holder may have removed it before it was locked here."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
