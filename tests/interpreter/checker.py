"""Memory and races of Triton kernels, seen from the interpreter (TRITON_INTERPRET=1).

    with Checker() as checker:
        ...                       # any calls of operators whose kernels run interpreted
    assert not checker.findings, checker.report()

The interpreter runs one program after the other on host memory. Here a pointer argument gets an address space of its
own instead, so every load and store says which argument it is meant for and which element; a shadow beside each storage
remembers what has happened to that element. What is found, by kind:

    bounds         an address that is no element of the tensor its pointer was made from, gaps of strides included
    uninitialised  a kernel or the host reads what was allocated and not written since
    race           two programs of one launch write an element, or one reads what another writes, or one store names an
                   element twice
    order          a program loads or stores again what it stored, with no barrier between: its threads may disagree
    in-place       a program stores what it loaded, with no barrier between, through a tile with fewer elements than it
                   has threads: several hold an element, and one may store before another has loaded
    read-only      a store into an argument that the operator's schema does not mark as written
    unwritten      an operator returns elements that nothing wrote
    overflow       an integer operation leaves 32 bits (only in a Checker of `some_programs`)

With `some_programs`, a function from the number of programs of a launch to those that are to run, sizes may be beyond
any memory: tensors on the meta device are arguments, loads from which give zeros.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from .shadow import Shadow

if TYPE_CHECKING:
    from typing_extensions import Self

SPACE = 1 << 44  # bytes between the addresses of two arguments; a storage begins in the middle
BUILDER, Handle, Executor = interpreter.interpreter_builder, interpreter.TensorHandle, interpreter.GridExecutor
ARITHMETIC = {"create_add": np.add, "create_sub": np.subtract, "create_mul": np.multiply}
WARP = 32


@dataclass
class Argument:
    """A tensor that a launch was given; no shadow if it has no memory."""

    name: str
    tensor: Tensor
    shadow: Shadow | None

    def elements(self, addresses: np.ndarray, base: int) -> tuple[np.ndarray, np.ndarray]:
        """Which elements of the storage addresses mean, and whether these are the tensor's."""
        elements, remainder = np.divmod(addresses.astype(np.int64) - base, self.tensor.itemsize)
        if self.shadow is not None:
            return elements, (remainder == 0) & self.shadow.belongs(self.tensor, elements)
        first, x = self.tensor.storage_offset(), self.tensor
        last = first + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else first - 1
        return elements, (remainder == 0) & (first <= elements) & (elements <= last)


class Checker(TorchDispatchMode):
    """See the module. `findings` counts (kind, kernel or operator, what, where)."""

    def __init__(self, some_programs: Callable[[int], Iterable[int]] | None = None) -> None:
        super().__init__()
        self.findings: Counter[tuple[str, str, str, str]] = Counter()
        self.launched: Counter[str] = Counter()
        self._examples: dict[tuple[str, str, str, str], str] = {}
        self._some_programs = some_programs
        self._shadows: dict[int, Shadow] = {}
        self._read_only: list[set[int]] = []
        self._arguments: list[Argument] = []
        self._names: Iterator[str] = iter(())
        self._kernel, self._program, self._threads, self._barriers = "", 0, 0, 0
        self._depth, self._installed = 0, ExitStack()

    def report(self) -> str:
        """A line for each finding."""
        return "\n".join(
            f"{kind} in {kernel}: {what}, at {where} ({count} times; first {self._examples[kind, kernel, what, where]})"
            for (kind, kernel, what, where), count in self.findings.items()
        )

    def __enter__(self) -> Self:
        """Take the interpreter's launches, loads and stores; entered again inside operators."""
        if self._depth == 0:
            replaced: dict[tuple[Any, str], Any] = {
                (Executor, "__call__"): self._launch(Executor.__call__),
                (Executor, "_init_args_hst"): lambda _, args, kwargs: (args, kwargs),
                (Executor, "_restore_args_dev"): lambda *_: None,
                (interpreter, "_implicit_cvt"): self._convert(interpreter._implicit_cvt),
                (BUILDER, "set_grid_idx"): self._begin_program(BUILDER.set_grid_idx),
                (BUILDER, "create_masked_load"): self._load(BUILDER.create_masked_load),
                (BUILDER, "create_masked_store"): self._store(BUILDER.create_masked_store),
                (BUILDER, "create_barrier"): self._barrier,
                (BUILDER, "create_atomic_rmw"): self._refuse_atomic,
                (BUILDER, "create_atomic_cas"): self._refuse_atomic,
            }
            if self._some_programs is not None:
                for name, exact in ARITHMETIC.items():
                    replaced[BUILDER, name] = self._within_32_bits(getattr(BUILDER, name), exact)
            for (owner, name), new in replaced.items():
                self._installed.enter_context(mock.patch.object(owner, name, new))
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Give them back."""
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            self._installed.close()
            self._shadows.clear()

    # The host: what is allocated, written, read and returned between launches.

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, and note what it does to memory that is watched."""
        kwargs = kwargs or {}
        if function.namespace not in ("aten", "prim", "prims"):
            return self._operator(function, args, kwargs)
        result = function(*args, **kwargs)
        name = function._opname
        with _disable_current_modes():
            if name.startswith(("empty", "new_empty")):
                if result.numel() and not result.is_meta:
                    self._shadows[result.untyped_storage().data_ptr()] = Shadow(result, written=False)
            elif self._shadows and not (function.is_view or name.endswith("_like") or name.startswith("new_")):
                self._host_access(function, args, kwargs)
        return result

    def _host_access(self, function: Any, args: Any, kwargs: Any) -> None:
        for argument, value in zip(function._schema.arguments, args, strict=False):
            self._host_argument(function, argument, value)
        if kwargs:
            for argument in function._schema.arguments[len(args) :]:
                self._host_argument(function, argument, kwargs.get(argument.name))

    def _host_argument(self, function: Any, argument: Any, value: Any) -> None:
        for x in (value,) if isinstance(value, Tensor) else value if isinstance(value, (list, tuple)) else ():
            shadow = self._shadow_of(x) if isinstance(x, Tensor) else None
            if shadow is None:
                continue
            if argument.alias_info is not None and argument.alias_info.is_write:
                shadow.mark_written(x)
            elif shadow.unwritten(x):
                self._find("uninitialised", str(function), f"{argument.name} {_layout(x)}", "the host", "")

    def _operator(self, function: Any, args: Any, kwargs: Any) -> Any:
        """A custom operator: what it calls is watched too; what its schema does not write must stay as it is."""
        arguments = function._schema.arguments
        given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        kept = [given.get(a.name) for a in arguments if a.alias_info is None or not a.alias_info.is_write]
        self._read_only.append({_address(x) for x in tree_leaves(kept) if isinstance(x, Tensor)})
        try:
            with self:
                results = function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        finally:
            self._read_only.pop()
        with _disable_current_modes():
            for i, x in enumerate(tree_leaves(results)):
                shadow = self._shadow_of(x) if isinstance(x, Tensor) else None
                if shadow is not None and (left := shadow.unwritten(x)):
                    self._find("unwritten", str(function), f"result {i} {_layout(x)}", "its end", f"{left} elements")
        return results

    def _shadow_of(self, x: Tensor) -> Shadow | None:
        return self._shadows.get(x.untyped_storage().data_ptr()) if x.numel() and not x.is_meta else None

    # The device: one launch, and what its programs load and store.

    def _launch(self, original: Callable[..., None]) -> Callable[..., None]:
        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            parameters = inspect.getfullargspec(executor.fn).args
            given = inspect.getcallargs(executor.fn, *args, **{n: x for n, x in kwargs.items() if n in parameters})
            tensors = [n for n, x in given.items() if isinstance(x, Tensor) and n not in executor.constexprs]
            self._kernel, self._names, self._arguments = executor.fn.__name__, iter(tensors), []
            warps = kwargs.get("num_warps", 4)
            self._threads = WARP * warps if warps > 1 else 0  # the threads of one warp load and store together
            self.launched[self._kernel] += 1
            for shadow in self._shadows.values():
                shadow.begin_launch()
            with _disable_current_modes(), np.errstate(over="ignore"), self._chosen_programs(executor):
                original(executor, *args, **kwargs)

        return launch

    @contextmanager
    def _chosen_programs(self, executor: Any) -> Iterator[None]:
        """Let the launch go through some of its programs, with loop variables of 32 bits as on a GPU."""
        if self._some_programs is None:
            yield
            return
        (count,) = executor.grid
        chosen, set_dim, set_idx = list(self._some_programs(count)), BUILDER.set_grid_dim, BUILDER.set_grid_idx
        kernels = [m for m in list(sys.modules.values()) if _defines_kernels(m)]
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(executor, "grid", (len(chosen),)))
            stack.enter_context(mock.patch.object(BUILDER, "set_grid_dim", partial(_whole_grid, set_dim, count)))
            stack.enter_context(mock.patch.object(BUILDER, "set_grid_idx", lambda x, *_: set_idx(chosen[x], 0, 0)))
            for module in kernels:
                stack.enter_context(mock.patch.object(module, "range", _narrow_range, create=True))
            yield

    def _begin_program(self, original: Callable[..., None]) -> Callable[..., None]:
        def begin(x: int, y: int, z: int) -> None:
            self._program = x
            original(x, y, z)

        return begin

    def _convert(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def convert(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return original(x)
            shadow = None
            if x.numel() and not x.is_meta:
                shadow = self._shadow_of(x)
                if shadow is None:
                    shadow = self._shadows[_address(x)] = Shadow(x, written=True)
            self._arguments.append(Argument(next(self._names), x, shadow))
            at = _base(len(self._arguments) - 1) + x.storage_offset() * x.itemsize
            kind = tl.pointer_type(tl.str_to_ty(interpreter.triton.runtime.jit.mangle_type(x), None).element_ty)
            return tl.tensor(Handle(np.array([at], np.uint64), kind), kind)

        return convert

    def _resolve(self, pointers: Any, mask: Any) -> tuple[Argument | None, np.ndarray, np.ndarray, Any]:
        """The argument that an access means, the elements of its storage, the mask without what lies outside, and
        pointers into real memory.
        """
        inside = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[inside]
        if not addresses.size:
            return None, addresses, inside, pointers
        number = int(addresses[0] // SPACE)
        argument = self._arguments[number]
        elements, valid = argument.elements(addresses, _base(number))
        if not valid.all():
            wrong = elements[~valid]
            example = f"{len(wrong)} elements in [{wrong.min()}, {wrong.max()}]"
            self._find("bounds", self._kernel, f"{argument.name} {_layout(argument.tensor)}", None, example)
            inside[inside] = valid
            elements = elements[valid]
        start = argument.shadow.address if argument.shadow is not None else 0
        real = pointers.data - np.uint64(_base(number)) + np.uint64(start)
        return argument, elements, inside, Handle(real, pointers.dtype)

    def _load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def load(pointers: Any, mask: Any, other: Any, *hints: Any) -> Any:
            argument, elements, inside, real = self._resolve(pointers, mask)
            shadow = None if argument is None else argument.shadow
            if argument is not None and shadow is not None:
                for kind, what, count in shadow.load(elements, self._program + 1, self._barriers):
                    self._find(kind, self._kernel, f"{argument.name}: {what}", None, f"{count} elements")
            return original(real, Handle(inside if shadow is not None else inside & False, tl.int1), other, *hints)

        return load

    def _store(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def store(pointers: Any, value: Any, mask: Any, *hints: Any) -> None:
            argument, elements, inside, real = self._resolve(pointers, mask)
            if argument is None:
                return
            if self._read_only and _address(argument.tensor) in self._read_only[-1]:
                self._find("read-only", self._kernel, argument.name, None, "")
            if len(np.unique(elements)) < len(elements):
                self._find("race", self._kernel, f"{argument.name}: one store names an element twice", None, "")
            if argument.shadow is None:
                return
            shared = pointers.data.size < self._threads
            for kind, what, count in argument.shadow.store(elements, self._program + 1, self._barriers, shared):
                self._find(kind, self._kernel, f"{argument.name}: {what}", None, f"{count} elements")
            original(real, value, Handle(inside, tl.int1), *hints)

        return store

    def _barrier(self) -> None:
        self._barriers += 1

    def _refuse_atomic(self, *_: Any) -> None:
        raise AssertionError(f"{self._kernel} has an atomic: the order of its additions differs from run to run")

    def _within_32_bits(self, original: Callable[..., Any], exact: Callable[..., Any]) -> Callable[..., Any]:
        def compute(left: Any, right: Any) -> Any:
            result = original(left, right)
            if left.dtype.scalar == tl.int32:
                wanted = exact(left.data.astype(np.int64), right.data.astype(np.int64))
                if (wanted != result.data).any():
                    self._find("overflow", self._kernel, "an offset", None, f"{wanted.flat[np.abs(wanted).argmax()]}")
            return result

        return compute

    def _find(self, kind: str, kernel: str, what: str, where: str | None, example: str) -> None:
        key = (kind, kernel, what, where or _lines())
        self.findings[key] += 1
        self._examples.setdefault(key, f"program {self._program}: {example}" if where is None else example)


def _whole_grid(set_dim: Callable[..., None], count: int, *_: int) -> None:
    set_dim(count, 1, 1)


def _base(number: int) -> int:
    """The address of the storage of an argument."""
    return number * SPACE + SPACE // 2


def _lines() -> str:
    """Where the running kernel is, from its own lines down to those of the device functions it is in."""
    frame, lines = sys._getframe(1), []
    while frame is not None and frame.f_code.co_name != "launch":
        path = frame.f_code.co_filename
        if path != __file__ and "/triton/" not in path and "<" not in path:
            lines.append(f"{path.rsplit('/', 1)[-1]}:{frame.f_lineno}")
        frame = frame.f_back
    return " > ".join(reversed(lines))


def _defines_kernels(module: Any) -> bool:
    return any(type(x) is interpreter.InterpretedFunction for x in list(getattr(module, "__dict__", {}).values()))


def _narrow_range(*bounds: Any) -> Iterator[Any]:
    """`range` over tensors of 32 bits, or of 64 if a bound has them."""
    wide = any(isinstance(b, tl.tensor) and b.dtype == tl.int64 for b in bounds)
    dtype, kind = (np.int64, tl.int64) if wide else (np.int32, tl.int32)
    return (tl.tensor(Handle(np.array([i], dtype), kind), kind) for i in range(*map(int, bounds)))


def _address(x: Tensor) -> int:
    return id(x) if x.is_meta else x.untyped_storage().data_ptr()


def _layout(x: Tensor) -> str:
    return f"{list(x.shape)} of strides {list(x.stride())}"
