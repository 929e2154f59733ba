"""``torch.compile`` of patched models, in any order.

A graph that was made before a patch knows nothing of its hooks, and never looks for new ones. But
it does look whether a ``forward`` of its own stands before a module's. So every module with hooks
gets one, which the compiler does not trace: the module is called from Python, hooks and all, and
what is inside is compiled as before. The hooks themselves are not compiled.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tokprune.errors import UnsupportedModelError

#: where a module keeps what stands before its forward
_MARK = "_tokprune_forward"
#: attributes that are put on modules
NAMES = ("forward", _MARK)
_WHY = "tokprune's hooks work here"


class Uncompiled:
    """Modules with hooks of ours, by number, from here to :meth:`release`."""

    def __init__(self, hooks: Mapping[nn.Module, set[int]]) -> None:
        for module, numbers in hooks.items():
            for place in (module._forward_pre_hooks, module._forward_hooks):
                for number in numbers & place.keys():
                    place[number] = torch.compiler.disable(place[number], reason=_WHY)
        self.modules = list(hooks)
        for module in self.modules:
            mark = module.__dict__.get(_MARK)
            if mark is None or module.__dict__.get("forward") is not mark.forward:
                mark = module.__dict__[_MARK] = _Mark(module)
            mark.users += 1

    def release(self) -> None:
        for module in self.modules:
            if (mark := module.__dict__.get(_MARK)) is not None:
                mark.users -= 1
                if not mark.users:
                    del module.__dict__[_MARK]
                    mark.remove(module)
        self.modules.clear()


class _Mark:
    """A ``forward`` of a module, for all sessions with hooks on it (models may share modules)."""

    def __init__(self, module: nn.Module) -> None:
        self.users = 0
        self.before = module.__dict__.get("forward")
        self.forward = module.__dict__["forward"] = _visible(module)

    def remove(self, module: nn.Module) -> None:
        if module.__dict__.get("forward") is not self.forward:
            return  # somebody has put another one before it
        del module.__dict__["forward"]
        if self.before is not None:
            module.__dict__["forward"] = self.before


def refuse_export() -> None:
    """Before a forward of the whole model.

    Raises:
        UnsupportedModelError: ``torch.export`` runs it.
    """
    if torch.compiler.is_exporting():
        raise UnsupportedModelError(
            "torch.export cannot follow a model patched by tokprune: where the images stand, and "
            "which of their tokens stay, is decided for every prompt. Export the model without a "
            "method, or compile it (torch.compile works)"
        )


def _visible(module: nn.Module) -> Callable[..., Any]:
    """A module's ``forward`` that the compiler sees and does not enter."""
    before = module.__dict__.get("forward")
    if before is None:
        cls: Any = type(module)
        return types.MethodType(_of_class(cls), module)

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs)

    return torch.compiler.disable(forward, recursive=False, reason=_WHY)  # type: ignore[no-any-return]


@functools.cache
def _of_class(cls: Any) -> Callable[..., Any]:
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    return torch.compiler.disable(forward, recursive=False, reason=_WHY)  # type: ignore[no-any-return]
