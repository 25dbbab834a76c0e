"""What to do once another module is imported, so that `import fla_ops` need not import it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Action = Callable[[Any], object]  # of the module

_waiting: dict[str, list[Action]] = {}


def when_imported(name: str, action: Action) -> None:
    """Run `action` on the module of that name: now if it is imported, else right after it has run."""
    if name in sys.modules:
        action(sys.modules[name])
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _waiting.setdefault(name, []).append(action)


class _Finder:
    """Finds the modules that are waited for where Python does, and adds the actions to their loading."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _waiting:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_act(module: ModuleType) -> None:
            run(module)
            for action in _waiting.pop(name, ()):
                action(module)

        spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec
