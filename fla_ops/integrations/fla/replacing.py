"""Which function of fla is replaced by which, and the replacing itself."""

from __future__ import annotations

import gc
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])
MISSING = object()  # what a module holds by a name that it does not have


class Replacement(NamedTuple):
    """What stands in for a function of fla's modules, or, with a class in the name, for a method."""

    module: str
    name: str
    function: Any
    kind: Literal["replaces", "adapts", "fills"]


class Found(NamedTuple):
    """A replacement and its place."""

    target: str
    owner: Any
    attribute: str
    old: Any
    new: Any


REPLACEMENTS: list[Replacement] = []
# What was replaced; the last is put back first.
_replaced: list[Found] = []


def replaces(target: str) -> Callable[[Function], Function]:
    """Enter a function as replacement of "module:function" or "module:Class.method". It has the same parameters."""
    return _enter(target, "replaces")


def adapts(target: str) -> Callable[[Function], Function]:
    """Enter a function that takes the target and returns its replacement, which has the same parameters."""
    return _enter(target, "adapts")


def fills(target: str) -> Callable[[Function], Function]:
    """Enter a function that takes what a module imported from another package, or None, and returns its replacement."""
    return _enter(target, "fills")


def _enter(target: str, kind: Literal["replaces", "adapts", "fills"]) -> Callable[[Function], Function]:
    module, name = target.split(":")

    def enter(function: Function) -> Function:
        REPLACEMENTS.append(Replacement(module, name, function, kind))
        return function

    return enter


def enable() -> dict[str, int]:
    """Serve fla's layers and models, whether built already or later; fla is imported.

    Returns:
        How many places held each function that was replaced; empty if that was done before.

    Raises:
        ImportError: if flash-linear-attention is not installed.
        RuntimeError: if this release of fla lacks one of the functions or calls it otherwise. Nothing is replaced then.
    """
    importlib.import_module("fla.models")
    if _replaced:
        return {}
    found = [_find(replacement) for replacement in REPLACEMENTS]
    _replaced.extend(found)  # after every check, so that an error leaves fla as it was
    return _replace({place.target: (place, place.old, place.new) for place in found})


def disable() -> None:
    """Put back what enable replaced, in models and modules that came after it too."""
    if _replaced:
        _replace({place.target: (place, place.new, place.old) for place in reversed(_replaced)})
    _replaced.clear()


def _find(replacement: Replacement) -> Found:
    target = f"{replacement.module}.{replacement.name}"
    *classes, attribute = replacement.name.split(".")
    owner: Any = importlib.import_module(replacement.module)
    for name in classes:
        owner = getattr(owner, name, None)
    old = MISSING if owner is None else vars(owner).get(attribute, MISSING)
    if replacement.kind == "fills":
        return Found(target, owner, attribute, old, replacement.function(None if old is MISSING else old))
    fla = f"fla {importlib.import_module('fla').__version__}"
    advice = "Nothing was replaced: use releases that fit each other"
    if old is MISSING:
        raise RuntimeError(f"fla_ops serves {target}, and {fla} has no such function. {advice}")
    new = replacement.function(old) if replacement.kind == "adapts" else replacement.function
    theirs, ours = _parameters(old), _parameters(new)
    if theirs != ours:
        raise RuntimeError(
            f"{fla} calls {target} with ({', '.join(theirs)}); fla_ops serves it with ({', '.join(ours)}). {advice}"
        )
    return Found(target, owner, attribute, old, new)


def _parameters(function: Any) -> list[str]:
    """Names, kinds and defaults, as one writes them."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        function = owner.forward  # F.apply itself says nothing; its context is no argument
    signature = inspect.signature(getattr(function, "__func__", function))
    parameters = [str(p.replace(annotation=p.empty)) for p in signature.parameters.values()]
    return parameters[1:] if isinstance(owner, type) else parameters


def _replace(swaps: dict[str, tuple[Found, Any, Any]]) -> dict[str, int]:
    """Put the second where the first is: by its place what only one module or class has, and every other function
    wherever fla holds it. How many places that were.
    """
    counts = dict.fromkeys(swaps, 0)
    held: dict[int, tuple[str, Any]] = {}
    for target, (place, old, new) in swaps.items():
        if not isinstance(place.owner, type) and callable(place.old):
            held[id(old)] = target, new
            continue
        counts[target] = 1
        if new is MISSING:
            delattr(place.owner, place.attribute)
        else:
            setattr(place.owner, place.attribute, new)
    for names in _namespaces():
        for key, value in list(names.items()):
            if id(value) in held:
                target, names[key] = held[id(value)]
                counts[target] += 1
    return counts


def _namespaces() -> Iterator[dict[Any, Any]]:
    """The names of fla's modules, the tables in them, and the attributes of its layers."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "fla":
            yield vars(module)
            yield from [table for key, table in vars(module).items() if key.isupper() and type(table) is dict]
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module) and type(thing).__module__.split(".")[0] == "fla":
            yield vars(thing)
