"""Shape, dtype, device and cu_seqlens checks, once for all families.

Every check states what was wanted and what came. The functions here run in fake implementations, on symbolic sizes,
and in launchers, on real ones: sizes are compared one dimension at a time (a comparison of tuples cannot be deferred
when a size is unbacked). A launcher first asks a plain predicate and comes here only to find the message.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CHUNK_SIZES = (16, 32, 64, 128, 256)
COUNTED = ("H", "HK", "HQ", "K", "V", "M", "D", "W")  # of which there is at least one
PLAIN = frozenset((Tensor, torch.nn.Parameter))
SETTINGS = frozenset((type(None), bool, int, float, str))
ACCEPTED = 4096  # calls that `once` remembers

Size = Any  # int or torch.SymInt


class Sizes(dict[str, Size]):
    """The size of each axis letter of a call."""

    def of(self, axes: str) -> tuple[Size, ...]:
        """The shape that axis letters describe, as in "B T H V"."""
        return tuple(self[letter] for letter in letters_of(axes))


def letters_of(axes: str) -> list[str]:
    """The letters of "N H V K (state_v_first=True)", whose note is for the message."""
    return axes.partition(" (")[0].split()


def pattern_of(axes: str) -> str:
    """Axis letters as a message shows them, "[N, H, V, K] (state_v_first=True)"."""
    _, note, text = axes.partition(" (")
    letters = (letter.replace("+", " + ") for letter in letters_of(axes))
    return f"[{', '.join(letters)}]{note}{text}"


def axes(c: Any, grouped: tuple[str, str, str, str] | None = None) -> Sizes:
    """Hold every tensor of a call to its axes, and return what each letter stands for.

    `c.axes` names the axes of each tensor. A letter is bound by the first tensor that has it, in the order of that
    table; the others must agree. Widths and numbers of heads are at least 1. `grouped` says whose heads share those of
    others, as in ("v", "H", "q and k", "HK"): H is a multiple of HK.
    """
    sizes = Sizes({"1": 1, "2": 2})
    tensor, heads, shared, base = grouped or ("",) * 4
    for name, letters in c.axes.items():
        x = getattr(c, name, None)
        if name == "cu_seqlens":
            sizes["N"] = packing(c, sizes.get("B", 1))
            sizes["N+1"] = sizes["N"] + 1
        elif x is not None and name != "cu_seqlens_cpu":
            known = heads in sizes and base in sizes
            bind(name, x, letters, sizes)
            if not known and heads in sizes and base in sizes:
                multiple(tensor, sizes[heads], shared, sizes[base])
    return sizes


def bind(name: str, x: Tensor, axes: str, sizes: Sizes) -> None:
    """Hold one tensor to its axes; letters that are new take its sizes."""
    letters = letters_of(axes)

    def message() -> str:
        sized = f" = ({', '.join(str(sizes[x]) for x in letters)})" if all(x in sizes for x in letters) else ""
        return f"{name} must be {pattern_of(axes)}{sized}, got {_sizes(x)}"

    torch._check_value(x.dim() == len(letters), message)
    for letter, size in zip(letters, x.shape, strict=True):
        if letter not in sizes:
            if letter in COUNTED:
                positive(name, size, letter)
            sizes[letter], sizes[f"{letter}-1"] = size, size - 1
    for letter, size in zip(letters, x.shape, strict=True):
        torch._check_value(size == sizes[letter], message)


def positive(name: str, size: Size, letter: str) -> None:
    """A width or head count must be at least 1."""
    torch._check_value(size >= 1, lambda: f"{name} must have {letter} >= 1, got {letter} = {size}")


def packing(c: Any, batch: Size) -> Size:
    """The number of sequences; the offsets of packed ones are checked as far as they can be without reading them."""
    offsets, on_host = c.cu_seqlens, getattr(c, "cu_seqlens_cpu", None)
    torch._check_value(offsets is not None or on_host is None, lambda: "cu_seqlens_cpu was given without cu_seqlens")
    if offsets is None:
        return batch
    cu_seqlens(offsets, batch, on_host)
    return offsets.shape[0] - 1


def once(check: Callable[[Any], Any], pools: tuple[str, ...] = ()) -> Callable[[Any], None]:
    """The eager fast path of a check: a call like one that was accepted before, in its tensors' shapes, dtypes and
    devices and in all else, is accepted at once. Pools, which are updated in place, may not share memory.
    """
    accepted: set[tuple[Any, ...]] = set()

    def eager(c: Any) -> None:
        key: list[Any] = []
        for x in c:
            kind = type(x)
            if kind in PLAIN:
                key += (x.shape, x.dtype, x.device)
            elif kind in SETTINGS:
                key.append(x)
            else:  # a tensor of another class: sizes may be symbolic, and there may be no memory
                check(c)
                return
        if torch._C._are_functorch_transforms_active():
            check(c)
            return
        for name in pools:
            key.append(getattr(c, name).stride())
        call = tuple(key)
        if call not in accepted:
            check(c)
            if any(isinstance(x, Tensor) and x.is_meta for x in c):
                return
            for name in pools:
                overlap(name, getattr(c, name))
            if len(accepted) >= ACCEPTED:
                accepted.clear()
            accepted.add(call)
        if len(pools) > 1:
            apart(c, pools)

    return eager


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


def mask(**tensors: Tensor | None) -> None:
    """What says yes or no."""
    for name, x in tensors.items():
        if x is not None:
            torch._check_type(
                x.dtype is torch.bool, lambda name=name, x=x: f"{name} must be bool, got {_names([x.dtype])}"
            )


def same_device(c: Any) -> None:
    """All tensors of a call lie where its first one lies, but for the host's copy of the offsets."""
    device = c[0].device
    for name, x in zip(c._fields, c, strict=True):
        if isinstance(x, Tensor) and name != "cu_seqlens_cpu":
            torch._check_value(
                x.device == device,
                lambda name=name, x=x: f"{name} must be on {device} like {c._fields[0]}, got {x.device}",
            )


def pools(c: Any, *names: str) -> None:
    """What a step updates in place, half or single precision (double beside float64 activations), and its rows."""
    for name in names:
        x = getattr(c, name)
        torch._check_type(
            x.dtype in (FLOATS if c[0].dtype is torch.float64 else FLOATS[1:]),
            lambda name=name, x=x: f"{name} must be float32, bfloat16 or float16, got {_names([x.dtype])}",
        )
    integral(slots=c.slots)


def integral(**tensors: Tensor | None) -> None:
    """Slots and counts."""
    for name, x in tensors.items():
        if x is not None:
            torch._check_type(
                x.dtype in (torch.int32, torch.int64),
                lambda name=name, x=x: f"{name} must be int32 or int64, got {_names([x.dtype])}",
            )


def overlap(name: str, x: Tensor) -> None:
    """No two elements of a tensor that is updated in place lie at one address."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(
                f"{name} is updated in place: no two of its elements may share memory, got shape {_sizes(x)} with "
                f"strides {x.stride()}; give it a clone"
            )
        extent += (size - 1) * stride


def apart(c: Any, pools: Sequence[str]) -> None:
    """Pools that are updated in one call do not share memory; views that interleave are apart."""
    spans = sorted((x.data_ptr(), _bytes(x), name) for name in pools for x in (getattr(c, name),))
    for (start, length, name), (after, _, other) in itertools.pairwise(spans):
        x, y = getattr(c, name), getattr(c, other)
        if start + length > after and length and (start == after or x.is_contiguous() or y.is_contiguous()):
            raise ValueError(f"{name} and {other} are updated in place: they may not share memory; give one a clone")


def _bytes(x: Tensor) -> int:
    """From the first byte to the last."""
    if x.numel() == 0:
        return 0
    return x.element_size() * (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)))


def chunk_size(size: int) -> None:
    """A power of two from 16 to 256."""
    torch._check_value(size in CHUNK_SIZES, lambda: f"chunk_size must be a power of two from 16 to 256, got {size}")


def stretch(every: int, size: int) -> None:
    """States are kept at the ends of chunks."""
    torch._check_value(
        every > 0 and every % size == 0, lambda: f"every must be a multiple of chunk_size = {size}, got {every}"
    )


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


def cu_seqlens_values(offsets: Tensor, time: int, name: str = "cu_seqlens", letter: str = "T") -> list[int]:
    """The offsets as integers, checked in full. For host tensors: on a device this would be a synchronisation."""
    values: list[int] = offsets.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {values[0]}")
    if values[-1] != time:
        raise ValueError(f"{name} must end at {letter} = {time}, got {values[-1]}")
    for n, (start, end) in enumerate(itertools.pairwise(values)):
        if end < start:
            raise ValueError(f"{name} must never fall, got {start} then {end} at position {n}")
    return values


def cu_seqlens_values_async(offsets: Tensor, time: Size, name: str = "cu_seqlens", letter: str = "T") -> None:
    """The same checks without reading the values: a violation raises when the device reports it."""
    torch._assert_async(offsets[0] == 0, f"{name} must start at 0")
    torch._assert_async(offsets[-1] == time, f"{name} must end at {letter}")
    torch._assert_async((offsets[1:] >= offsets[:-1]).all(), f"{name} must never fall")


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


def step_counts(accepted: Tensor, time: int) -> list[int]:
    """How many of T steps each sequence takes, checked in full. For host tensors."""
    values: list[int] = accepted.tolist()
    for count in values:
        if not 0 <= count <= time:
            raise ValueError(f"accepted must be in [0, T] with T = {time}, got {count}")
    return values


def state_dtype(x: Tensor) -> torch.dtype:
    """States are carried in float32, or in float64 for float64 activations."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _sizes(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
