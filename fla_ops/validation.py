"""Shape, dtype, device and cu_seqlens checks, once for all families.

Every check states what was wanted and what came. The functions here run in fake implementations, on symbolic sizes,
and in launchers, on real ones: sizes are compared one dimension at a time (a comparison of tuples cannot be deferred
when a size is unbacked). A launcher first asks a plain predicate and comes here only to find the message.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CHUNK_SIZES = (16, 32, 64, 128, 256)

Size = Any  # int or torch.SymInt


def shape(name: str, x: Tensor, letters: str, sizes: Sequence[Size]) -> None:
    """`x` must have exactly `sizes`; `letters` names them in the message, as in "[B, T, H]"."""

    def message() -> str:
        return f"{name} must be {letters} = ({', '.join(map(str, sizes))}), got {_sizes(x)}"

    torch._check_value(x.dim() == len(sizes), message)
    for got, wanted in zip(x.shape, sizes, strict=True):
        torch._check_value(got == wanted, message)


def rank(name: str, x: Tensor, letters: str) -> None:
    """`x` must have as many dimensions as `letters` names."""
    wanted = letters.count(",") + 1
    torch._check_value(x.dim() == wanted, lambda: f"{name} must be {letters}, got {_sizes(x)}")


def positive(name: str, size: Size, letter: str) -> None:
    """A width or head count must be at least 1."""
    torch._check_value(size >= 1, lambda: f"{name} must have {letter} >= 1, got {letter} = {size}")


def multiple(name: str, heads: Size, of: str, base: Size) -> None:
    """Grouped heads: `heads` of `name` must be a multiple of the `base` heads of `of`."""
    torch._check_value(
        heads % base == 0, lambda: f"{name} must have a multiple of the {base} heads of {of}, got {heads} heads"
    )


def same_dtype(**tensors: Tensor) -> None:
    """Activations share one floating dtype."""
    names = ", ".join(tensors)
    dtypes = [x.dtype for x in tensors.values()]
    torch._check_type(
        dtypes[0] in FLOATS and all(d == dtypes[0] for d in dtypes),
        lambda: f"{names} must share one of float64, float32, bfloat16, float16, got {_names(dtypes)}",
    )


def floating(**tensors: Tensor | None) -> None:
    """Gates, biases and states may have any floating dtype."""
    for name, x in tensors.items():
        if x is not None:
            torch._check_type(
                x.dtype in FLOATS,
                lambda name=name, x=x: f"{name} must be float64, float32, bfloat16 or float16, got {_names([x.dtype])}",
            )


def same_device(reference: Tensor, **tensors: Tensor | None) -> None:
    """All tensors lie where the first activation lies."""
    for name, x in tensors.items():
        if x is not None:
            torch._check_value(
                x.device == reference.device,
                lambda name=name, x=x: f"{name} must be on {reference.device} like q, got {x.device}",
            )


def chunk_size(size: int) -> None:
    """A power of two from 16 to 256."""
    torch._check_value(size in CHUNK_SIZES, lambda: f"chunk_size must be a power of two from 16 to 256, got {size}")


def exclusive(**arguments: object) -> None:
    """At most one of the arguments may be given."""
    given = [name for name, value in arguments.items() if value is not None]
    torch._check_value(
        len(given) <= 1, lambda: f"give at most one of {' and '.join(arguments)}, got {' and '.join(given)}"
    )


def cu_seqlens(offsets: Tensor, batch: Size, on_host: Tensor | None = None) -> None:
    """What can be known about packed-sequence offsets without reading them."""
    for name, x in (("cu_seqlens", offsets), ("cu_seqlens_cpu", on_host)):
        if x is None:
            continue
        torch._check_type(
            x.dtype in (torch.int32, torch.int64),
            lambda name=name, x=x: f"{name} must be int32 or int64, got {_names([x.dtype])}",
        )
        torch._check_value(x.dim() == 1, lambda name=name, x=x: f"{name} must be [N + 1], got {_sizes(x)}")
        torch._check_value(
            x.shape[0] >= 2, lambda name=name, x=x: f"{name} must be [N + 1] with N >= 1, got {_sizes(x)}"
        )
    torch._check_value(batch == 1, lambda: f"packed sequences (cu_seqlens) need batch B = 1, got B = {batch}")
    if on_host is not None:
        torch._check_value(on_host.device.type == "cpu", lambda: f"cu_seqlens_cpu must be on cpu, got {on_host.device}")
        torch._check_value(
            on_host.shape[0] == offsets.shape[0],
            lambda: f"cu_seqlens_cpu must be [N + 1] = ({offsets.shape[0]},) like cu_seqlens, got {_sizes(on_host)}",
        )


def cu_seqlens_values(offsets: Tensor, time: int) -> list[int]:
    """The offsets as integers, checked in full. For host tensors: on a device this would be a synchronisation."""
    values: list[int] = offsets.tolist()
    if values[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {values[0]}")
    if values[-1] != time:
        raise ValueError(f"cu_seqlens must end at T = {time}, got {values[-1]}")
    for n, (start, end) in enumerate(itertools.pairwise(values)):
        if end < start:
            raise ValueError(f"cu_seqlens must never fall, got {start} then {end} at position {n}")
    return values


def cu_seqlens_values_async(offsets: Tensor, time: Size) -> None:
    """The same checks without reading the values: a violation raises when the device reports it."""
    torch._assert_async(offsets[0] == 0, "cu_seqlens must start at 0")
    torch._assert_async(offsets[-1] == time, "cu_seqlens must end at T")
    torch._assert_async((offsets[1:] >= offsets[:-1]).all(), "cu_seqlens must never fall")


def slot_values(slots: Tensor, pool: int) -> list[int]:
    """The slots as integers, checked in full. For host tensors."""
    values: list[int] = slots.tolist()
    used = [s for s in values if s != -1]
    for s in used:
        if not 0 <= s < pool:
            raise ValueError(f"slots must be -1 or in [0, P) with P = {pool}, got {s}")
    if len(set(used)) < len(used):
        raise ValueError(f"slots must differ from each other apart from -1, got {values}")
    return values


def scale_of(q: Tensor, scale: float | None) -> float:
    """K ** -0.5 unless given."""
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def _sizes(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
