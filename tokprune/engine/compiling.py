"""``torch.compile`` of patched models, in any order.

A graph that was made before a patch knows nothing of its hooks, and never looks for new ones. But
it does look at what stands before a module's ``forward``. So every module with hooks gets one of
its own. Most of these the compiler does not enter: the module is called from Python, hooks and all,
and what is inside is compiled as before. Where every hook of a module has a form that can be
traced (:mod:`tokprune.engine.traced_step`), the compiler goes through it; what it meets there is
good for this one patch.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code

from tokprune.errors import UnsupportedModelError

#: where a module keeps what stands before its forward, and which patch that is of
_MARK, _PATCH = "_tokprune_forward", "_tokprune_patch"
#: attributes that are put on modules
NAMES = ("forward", _MARK, _PATCH)
_WHY = "tokprune's hooks work here"
_STEP = "_tokprune_step"
_numbers = itertools.count(1)


def with_step(
    hook: Callable[..., Any], step: Callable[..., Any], prefill: bool = False
) -> Callable[..., Any]:
    """A hook that ``step`` stands for where the compiler traces it; see
    :mod:`tokprune.engine.traced_step`. ``prefill``: where that gives NotImplemented, the compiler
    can trace the hook itself."""

    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs)

    setattr(run, _STEP, (hook, step, prefill))
    return run


def _outside(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook as the compiler is to see it."""
    hook, step, prefill = getattr(hook, _STEP, (hook, None, False))
    python = torch.compiler.disable(hook, reason=_WHY)
    if step is None:
        return python  # type: ignore[no-any-return]

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            done = step(*args, **kwargs)
            if done is not NotImplemented:
                return done
            if prefill:
                return hook(*args, **kwargs)
        return python(*args, **kwargs)

    skip_code(run.__code__)
    return run


class Uncompiled:
    """Modules with hooks of ours, by number, from here to :meth:`release`."""

    def __init__(self, hooks: Mapping[nn.Module, set[int]]) -> None:
        self.modules = list(hooks)
        for module, numbers in hooks.items():
            through = True
            for place in (module._forward_pre_hooks, module._forward_hooks):
                for number in numbers & place.keys():
                    through = through and hasattr(place[number], _STEP)
                    place[number] = _outside(place[number])
            mark = module.__dict__.get(_MARK)
            if mark is None or module.__dict__.get("forward") is not mark.forward:
                mark = module.__dict__[_MARK] = _Mark(module, through)
            mark.users += 1
            _renumber(module)

    def release(self) -> None:
        for module in self.modules:
            if (mark := module.__dict__.get(_MARK)) is not None:
                mark.users -= 1
                _renumber(module)
                if not mark.users:
                    del module.__dict__[_MARK]
                    del module.__dict__[_PATCH]
                    mark.remove(module)
        self.modules.clear()


def _renumber(module: nn.Module) -> None:
    """What was traced up to now is good no more. A text, since numbers may become variables."""
    module.__dict__[_PATCH] = str(next(_numbers))


def _look(module: nn.Module) -> None:
    """Has a graph that is traced here depend on the patch."""
    if not getattr(module, _PATCH):
        raise RuntimeError(f"{type(module).__name__} has lost the number of its patch")


class _Mark:
    """A ``forward`` of a module, for all sessions with hooks on it (models may share modules);
    ``through``: the compiler may enter it."""

    def __init__(self, module: nn.Module, through: bool) -> None:
        self.users = 0
        self.before = module.__dict__.get("forward")
        self.forward = module.__dict__["forward"] = _visible(module, through)

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


def _visible(module: nn.Module, through: bool) -> Callable[..., Any]:
    """A module's ``forward`` that the compiler sees."""
    before = module.__dict__.get("forward")
    if before is None:
        cls: Any = type(module)
        return types.MethodType(_of_class(cls, through), module)

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        _look(module)
        return before(*args, **kwargs)

    return forward if through else _closed(forward)


@functools.cache
def _of_class(cls: Any, through: bool) -> Callable[..., Any]:
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        _look(self)
        return type(self).forward(self, *args, **kwargs)

    return forward if through else _closed(forward)


def _closed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(forward, recursive=False, reason=_WHY)  # type: ignore[no-any-return]
