"""``torch.compile`` of patched models, in any order.

A graph that was made before a patch knows nothing of its hooks, and never looks for new ones. But
it does look at what stands before a module's ``forward``. So every module with hooks gets one of
its own; what the compiler meets behind it is good for this one patch.

There are three kinds of hooks. Most of those around the decoder's layers and inside the tower work
on tensors and on numbers that are the same for all prompts of one shape: the compiler traces them
(:func:`traceable`), and a decoder whose methods read nothing from the device is one graph. Those
that find images in a prompt run in Python, and break the graph. In decode steps there are no
images, and what they do there may have a form of its own (:func:`with_step`,
:mod:`tokprune.engine.traced_step`).

Where a method reads the device after all, the compiler gives up the loop over the layers and
compiles each of them. They are of one class, so they share its code, of which the compiler makes no
more than a few versions; so the ``forward`` of each module is code of its own.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo.eval_frame import skip_code

from tokprune.errors import UnsupportedModelError

#: where a module keeps what stands before its forward, and which patch that is of
_MARK, _PATCH = "_tokprune_forward", "_tokprune_patch"
#: attributes that are put on modules
NAMES = ("forward", _MARK, _PATCH)
_WHY = "tokprune's hooks work here"
_FORM, _STATE = "_tokprune_form", "_tokprune_state"
_numbers = itertools.count(1)
#: modules with a mark whose class has such a ``__call__``
_dispatching: Counter[types.CodeType] = Counter()


def with_step(hook: Callable[..., Any], step: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that ``step`` stands for where the compiler traces it; it gives NotImplemented where
    the hook has to run in Python."""
    return _formed(hook, step, False)


def traceable(
    hook: Callable[..., Any], step: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """A hook that the compiler can trace itself, where ``step`` gives NotImplemented."""
    return _formed(hook, step, True)


def _formed(
    hook: Callable[..., Any], step: Callable[..., Any] | None, itself: bool
) -> Callable[..., Any]:
    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs)

    setattr(run, _FORM, (hook, step, itself))
    return run


def _outside(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook as the compiler is to see it."""
    hook, step, itself = getattr(hook, _FORM, (hook, None, False))
    python = torch.compiler.disable(hook, reason=_WHY)
    if step is None and not itself:
        return python  # type: ignore[no-any-return]

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            done = NotImplemented if step is None else step(*args, **kwargs)
            if done is not NotImplemented:
                return done
            if itself:
                return hook(*args, **kwargs)
        return python(*args, **kwargs)

    # the compiler goes through it, but does not start at it: called from Python, it is Python
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
                    through = through and hasattr(place[number], _FORM)
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


def hand_over(module: nn.Module, kwargs: dict[str, Any], current: Any) -> None:
    """Before a module's forward: have what is traced in it find ``current.state`` among its
    arguments. What is found by way of a module, as hooks are, holds numbers that never change to
    the compiler, and every length of a prompt would get a graph of its own."""
    mark = module.__dict__.get(_MARK)
    if mark is not None and module.__dict__.get("forward") is mark.forward:
        kwargs[_STATE] = current, current.state


def _take_over(kwargs: dict[str, Any]) -> None:
    if _STATE in kwargs:
        current, state = kwargs.pop(_STATE)
        current.state = state  # it is already, but the compiler sees it come from the arguments


class _Mark:
    """A ``forward`` of a module, for all sessions with hooks on it (models may share modules);
    ``through``: the compiler may enter it."""

    def __init__(self, module: nn.Module, through: bool) -> None:
        self.users = 0
        self.before = module.__dict__.get("forward")
        self.forward = module.__dict__["forward"] = _visible(module, through)
        _dispatch(type(module), 1)

    def remove(self, module: nn.Module) -> None:
        _dispatch(type(module), -1)
        if module.__dict__.get("forward") is not self.forward:
            return  # somebody has put another one before it
        del module.__dict__["forward"]
        if self.before is not None:
            module.__dict__["forward"] = self.before


def _dispatch(cls: Any, change: int) -> None:
    """Layers of transformers 4.57 have a ``__call__`` of their class around hooks and forward: as
    long as a patch is on, the compiler goes through it, but does not start at it."""
    if cls.__call__ is not nn.Module.__call__:
        code = cls.__call__.__code__
        _dispatching[code] += change
        (skip_code if _dispatching[code] else reset_code)(code)


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
    before, cls = module.__dict__.get("forward"), type(module)
    if before is None:
        # a method, so that a copy of the module is asked for itself
        @functools.wraps(cls.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            _look(self)
            _take_over(kwargs)
            return type(self).forward(self, *args, **kwargs)

        own = _own_code(forward)
        return types.MethodType(own if through else _closed(own), module)

    @functools.wraps(before)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        _look(module)
        _take_over(kwargs)
        return before(*args, **kwargs)

    own = _own_code(replaced)
    return own if through else _closed(own)


def _own_code(function: Any) -> Callable[..., Any]:
    """The function with code that no other has: graphs, and their number, are kept by code."""
    code = function.__code__.replace(co_name=function.__code__.co_name)
    own = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(own, function)


def _closed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward`` that the compiler starts at, but does not go through."""

    @functools.wraps(forward)
    def closed(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return torch.compiler.disable(closed, recursive=False, reason=_WHY)  # type: ignore[no-any-return]
