"""Act on a module once it has been imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class AfterImport:
    """Calls ``act`` with the module ``name``: at once where it is imported already, else right
    after its code has run."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name, self.act = name, act
        self._searching = False
        if name in sys.modules:
            act(sys.modules[name])
        else:
            sys.meta_path.insert(0, self)  # type: ignore[arg-type]

    def cancel(self) -> None:
        """Wait no longer."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)  # type: ignore[arg-type]

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find, with a loader that calls us afterwards."""
        if name != self.name or self._searching:
            return None
        self._searching = True  # an other finder may ask all of them in turn
        try:
            found = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
            spec = next(filter(None, found), None)
        finally:
            self._searching = False
        loader: Any = None if spec is None else spec.loader
        if not hasattr(loader, "exec_module"):
            return spec
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                self.cancel()
                self.act(module)

        loader.exec_module = exec_module
        return spec
