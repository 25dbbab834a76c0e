"""The machine that a measurement ran on, and how busy other processes kept it. Nothing here tells its name."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "fla-core", "transformers")
BUSY = 0.2  # mean number of cores used by other processes above which times are not to be relied on


def version(package: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(device: torch.device) -> dict[str, Any]:
    """Collect device, versions, date and commit, which every results file states."""
    return {
        "device": device_name(device),
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "commit": _commit(),
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor and its cores."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_model()}, {os.cpu_count()} cores"


def source(device: torch.device) -> str:
    """Say in one line where the numbers of a table come from."""
    about = describe(device)
    threads = f", {about['threads']} threads" if device.type == "cpu" else ""
    return f"measured on {about['device']}{threads}, torch {about['versions']['torch']}, {about['date']}"


def cache_bytes(device: torch.device) -> int:
    """The size of the last-level cache, where the data of repeated calls could stay."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [
        int(path.read_text().strip().removesuffix("K")) << 10
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if path.read_text().strip().endswith("K")
    ]
    return max(sizes, default=32 << 20)


class OtherLoad:
    """The load that other processes put on the machine while something was timed."""

    def __init__(self) -> None:
        self._work = self._wall = 0.0
        self._known = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count the work of other processes inside; the compilers that a warm-up starts run outside."""
        before = _times()
        yield
        after = _times()
        if before is None or after is None:
            self._known = False
            return
        busy, mine, wall = (b - a for a, b in zip(before, after, strict=True))
        self._work += busy - mine
        self._wall += wall

    def cores(self) -> float | None:
        """The mean number of cores that others kept busy; None where the system does not tell."""
        return max(0.0, self._work) / self._wall if self._known and self._wall > 0 else None


OTHER_LOAD = OtherLoad()


def _times() -> tuple[float, float, float] | None:
    """Seconds of work on all cores, of work by this process, and of the clock; None where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, interrupt, soft, steal = map(int, stat.read_text().split()[1:9])
    own = os.times()
    ticks = os.sysconf("SC_CLK_TCK")
    busy = (user + nice + system + interrupt + soft + steal) / ticks
    return busy, own.user + own.system, own.elapsed


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit, with a "+" if the package's files differ from it; None outside a checkout."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "fla_ops", "meta", "registrations")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
