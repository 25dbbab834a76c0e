"""FLOP formulas, over the shapes that `torch.utils.flop_counter` passes. A multiply-add counts as two."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

CHUNK = 64
COUNTER = "torch.utils.flop_counter"

_formulas: dict[Any, Callable[..., int]] = {}


def register(packet: Any, formula: Callable[..., int]) -> None:
    """Make FlopCounterMode count `packet`: now if the counter is imported, else when it will be (it imports Triton)."""

    def counted(*args: Any, **_: Any) -> int:  # the counter also passes out_shape
        return formula(*args)

    _formulas[packet] = counted
    if COUNTER in sys.modules:
        sys.modules[COUNTER].register_flop_formula(packet)(counted)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported:
    """A finder that registers the formulas right after the counter's module has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            for packet, formula in _formulas.items():
                module.register_flop_formula(packet)(formula)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _sizes(q: Any, v: Any) -> tuple[int, int, int, int]:
    """Steps over all value heads, and the widths."""
    batch, time, _, key_width = q
    return batch * time * v[2], key_width, v[3], time


def linear_chunk(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    """Scores and their product with v inside a chunk; the state's update and its read-out across chunks."""
    steps, key, value, _time = _sizes(q, v)
    return steps * (2 * CHUNK * (key + value) + 4 * key * value)


def linear_chunk_backward(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    steps, key, value, _time = _sizes(q, v)
    return steps * (CHUNK * (6 * key + 4 * value) + 10 * key * value)


def linear_recurrent(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    """Decay, outer product and read-out of the state at each step."""
    steps, key, value, _time = _sizes(q, v)
    return steps * 5 * key * value


def linear_recurrent_backward(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    return 3 * linear_recurrent(q, k, v)


def linear_parallel(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    """The lower triangle of two T x T products."""
    steps, key, value, time = _sizes(q, v)
    return steps * time * (key + value)


def linear_parallel_backward(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    steps, key, value, time = _sizes(q, v)
    return steps * time * (3 * key + 2 * value)


def linear_step(q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    sequences, heads, value = v
    return int(sequences * heads * 5 * q[-1] * value)
