"""How a kernel is launched, and with which settings.

The settings are data: `<device class>.json` maps a kernel's name to a list of entries, each for a dtype ("float32",
"half" or "any"; "float16" where the other half precision's would not do) and for widths up to `key_width` and
`value_width`. The narrowest entry that covers a call is used, else the widest. An entry holds block sizes, num_warps
and num_stages; `precision` says how float32 operands are multiplied. No entry spills for the widths it covers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensor

Entry = dict[str, Any]

CLASSES = ("sm_80", "sm_90", "sm_100", "gfx942")


@cache
def table(device_class: str) -> dict[str, list[Entry]]:
    """Every entry of a device class, by kernel."""
    found: dict[str, list[Entry]] = json.loads(Path(__file__).with_name(f"{device_class}.json").read_text())
    return found


Launch = Callable[..., None]  # of a kernel, the number of programs, arguments and constants
_elsewhere: tuple[str, Launch] | None = None  # the device class that launchers are to serve, and what launching is


@contextmanager
def elsewhere(device_class: str, launch: Launch) -> Iterator[None]:
    """Inside, launchers of host tensors take the settings for this device class, operators on the host are launchers,
    and `launch` is called instead of launching anything.
    """
    global _elsewhere  # noqa: PLW0603
    before, _elsewhere = _elsewhere, (device_class, launch)
    try:
        yield
    finally:
        _elsewhere = before


def is_elsewhere() -> bool:
    """Whether launchers stand in for the host's own code."""
    return _elsewhere is not None


def device_class(index: int | None) -> str:
    """The table for the device of this index; None is the host, where kernels run interpreted."""
    return _class_of(index) if _elsewhere is None else _elsewhere[0]


@cache
def _class_of(index: int | None) -> str:
    if index is None:
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    if major < 8:
        raise RuntimeError(f"the kernels need compute capability 8.0 or newer, got {major}.x on cuda:{index}")
    # Cards of 8.6, 8.9 and 12.x have 99 KiB of shared memory, which every entry of sm_80 stays below.
    return {8: "sm_80", 9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def entry(kernel: str, x: torch.Tensor, key_width: int, value_width: int) -> Entry:
    """The settings of `kernel` for activations like `x` of these widths."""
    return _nearest(device_class(x.device.index), kernel, x.dtype, key_width, value_width)


def covers(kernel: str, x: torch.Tensor, key_width: int) -> bool:
    """Whether a kernel that holds all of key_width in one program has settings for it."""
    widest: int = entry(kernel, x, key_width, 0)["key_width"]
    return widest >= key_width


@cache
def _nearest(device: str, kernel: str, dtype: torch.dtype, key_width: int, value_width: int) -> Entry:
    own = str(dtype).removeprefix("torch.")
    wanted = ("any", own) if dtype is torch.float32 else ("any", "half", own)
    entries = [e for e in table(device)[kernel] if e["dtype"] in wanted]
    entries.sort(key=lambda e: e["dtype"] != own)  # of two for the same widths, the first is used
    covering = [e for e in entries if e["key_width"] >= key_width and e["value_width"] >= value_width]

    def widths(e: Entry) -> tuple[int, int]:
        return e["key_width"], e["value_width"]

    return min(covering, key=widths) if covering else max(entries, key=widths)


def block(limit: int, width: int) -> int:
    """The tile for `width`: a power of two, at least the 16 that a matrix product needs, at most `limit`."""
    return min(limit, max(16, 1 << (width - 1).bit_length()))


def precision(entry: Entry) -> str:
    """How float32 operands are multiplied: "ieee", or "tf32x3", three products of tf32 parts."""
    chosen: str = entry.get("precision", "ieee")
    return chosen


def options(entry: Entry) -> dict[str, int]:
    """The part of an entry that Triton's compiler takes."""
    return {"num_warps": entry["num_warps"], "num_stages": entry["num_stages"]}


def run(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Launch `programs` programs along axis 0, which is not limited to 65535; in traced code, record the launch."""
    if _elsewhere is not None:
        if programs > 0:
            _elsewhere[1](kernel, programs, *args, **constants)
    elif any(isinstance(x, FunctionalTensor) for x in args):
        torch.library.wrap_triton(kernel)[(programs,)](*args, **constants)
    elif programs > 0:
        kernel[(programs,)](*args, **constants)
