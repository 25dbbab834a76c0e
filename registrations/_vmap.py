"""The batching rule of every operator: a mapped axis becomes more heads.

Every tensor of a call has one axis of heads, or of channels, and these do not see each other. So a tensor of H heads
that is mapped over M is one of M * H heads, and one that is not mapped is repeated. Packed sequences, decays and sinks
of a head, states and grouped heads need no rule of their own, and the gradient of what the samples share comes apart by
sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor
from torch._ops import OpOverload

from fla_ops.signature import Gradient, Signature
from fla_ops.validation import letters_of

HEADS = ("H", "HK", "HQ", "D")
NOT_MAPPED = 1_000_003  # no batch has this size


def rule(op: OpOverload, declaration: Signature | Gradient) -> Callable[..., Any]:
    """The function for `torch.library.register_vmap`."""
    names: tuple[str, ...]
    mutated: tuple[str, ...]
    parts: Callable[[Sequence[Any]], Sequence[Any]]
    if isinstance(declaration, Gradient):
        names, mutated, parts = declaration.arguments, (), declaration.parts_of
    else:
        signature = declaration
        names, mutated, parts = signature.fields, signature.mutated, lambda args: (signature.call_of(args),)

    def run(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        in_dims = [dim if isinstance(x, Tensor) else None for x, dim in zip(args, in_dims, strict=True)]
        call = parts(args)[0]
        axes = axes_of(call.axes)
        given = dict(zip(names, args, strict=False))
        dims = dict(zip(names, in_dims, strict=False))
        apart = [name for name, dim in dims.items() if dim is not None and heads_axis(axes, name) is None]
        if apart:  # offsets or slots of each sample: nothing to fold them into
            return _one_by_one(op, info.batch_size, in_dims, args)
        for name in mutated:
            if dims[name] is None:
                raise ValueError(
                    f"vmap: {op._schema.name} updates {name} in place, which is not mapped over while other inputs are"
                )
        folded = {
            name: _fold(x, dims[name], heads_axis(axes, name), info.batch_size) if isinstance(x, Tensor) else x
            for name, x in given.items()
        }
        folded |= {name: folded[name].clone() for name in mutated}  # where folding is a view, what follows overlaps
        results = op(*folded.values())
        for name in mutated:
            unfolded = _unfold(folded[name], heads_axis(axes, name), info.batch_size)
            given[name].movedim(dims[name], 0).copy_(unfolded)
        if results is None:
            return None, None
        single = isinstance(results, Tensor)
        outputs = tuple(
            None if x is None else _unfold(x, heads_axis(axes, name), info.batch_size)
            for name, x in zip(declaration.results, (results,) if single else results, strict=True)
        )
        if single:
            return outputs[0], 0
        return outputs, tuple(None if x is None else 0 for x in outputs)

    return run


def legacy_kernel(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The function to register under the Batched key, for `torch.autograd`'s own batched gradients.

    They arrive through an older vmap, of `torch.autograd.grad(..., is_grads_batched=True)`, whose tensors know their
    levels and sizes but do not tell: a level that a tensor does not have shows as an axis of the size asked for.
    """

    def run(*args: Any) -> Any:
        level = _C._vmapmode_increment_nesting() - 1
        _C._vmapmode_decrement_nesting()
        while True:
            apart = [torch._remove_batch_dim(x, level, NOT_MAPPED, 0) if _is_batched(x) else None for x in args]
            sizes = {len(x) for x in apart if x is not None} - {NOT_MAPPED}
            if sizes:
                break
            level -= 1
        mapped = [x is not None and len(x) != NOT_MAPPED for x in apart]
        inputs = [x if on else y for x, y, on in zip(apart, args, mapped, strict=True)]
        outputs, dims = rule(_Info(sizes.pop()), [0 if on else None for on in mapped], *inputs)
        if outputs is None:
            return None
        if isinstance(outputs, Tensor):
            return torch._add_batch_dim(outputs, dims, level)
        return tuple(None if x is None else torch._add_batch_dim(x, 0, level) for x in outputs)

    return run


class _Info(NamedTuple):
    batch_size: int


def _is_batched(x: Any) -> bool:
    return isinstance(x, Tensor) and _C._functorch.is_legacy_batchedtensor(x)


def axes_of(axes: Mapping[str, str]) -> dict[str, list[str]]:
    """The letters of every tensor, those of gradients included."""
    letters = {name: letters_of(text) for name, text in axes.items()}
    return letters | {f"d{name}": text for name, text in letters.items()}


def heads_axis(axes: Mapping[str, list[str]], name: str) -> int | None:
    """Which axis of a tensor is that of its heads."""
    return next((i for i, letter in enumerate(axes.get(name, ())) if letter in HEADS), None)


def _fold(x: Tensor, dim: int | None, heads: int | None, size: int) -> Tensor:
    """[M, ..., H, ...] with M at `dim`, or M times the same, to [..., M * H, ...]."""
    if heads is None:
        return x
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, heads).flatten(heads, heads + 1)


def _unfold(x: Tensor, heads: Any, size: int) -> Tensor:
    """The inverse, with M first."""
    apart: Tensor = x.unflatten(heads, (size, -1))
    return apart.movedim(heads, 0)


def _one_by_one(op: OpOverload, size: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> tuple[Any, Any]:
    """A call for each sample."""
    calls = [
        op(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True))) for i in range(size)
    ]
    if calls[0] is None:
        return None, None
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    outputs = tuple(None if x[0] is None else torch.stack(x) for x in zip(*calls, strict=True))
    return outputs, tuple(None if x is None else 0 for x in outputs)
