"""Gradient checkpointing of layers with hooks.

What a checkpoint holds is computed twice, the second time in the backward pass, where the engine
knows nothing of the forward any more. So a drop before a layer stands outside its checkpoint:
transformers from 5.x on calls hooks there, older releases inside, and then these are called around
it. Blocks that lose tokens in their middle (vision encoders) go without a checkpoint.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tokprune.engine.compat import HOOKS_IN_CHECKPOINT
from tokprune.engine.compiling import traceable

_FUNCTION = "_gradient_checkpointing_func"


def is_checkpointed(module: Any) -> bool:
    """Whether a layer of transformers runs in a checkpoint now."""
    return bool(getattr(module, "gradient_checkpointing", False)) and bool(module.training)


@contextmanager
def without_checkpoints(modules: Iterable[Any]) -> Iterator[None]:
    """Layers that keep what their backward pass needs."""
    changed = [module for module in modules if is_checkpointed(module)]
    for module in changed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in changed:
            module.gradient_checkpointing = True


class LayerHooks:
    """``before(module, args, kwargs)`` and ``after(module, args, output)`` of a decoder layer, as
    forward hooks; or around its checkpoint, from :meth:`enter` to :meth:`leave`. ``steps``: what
    stands for either in a step that is traced."""

    def __init__(
        self, module: Any, before: Callable[..., Any], after: Callable[..., Any] | None,
        steps: tuple[Callable[..., Any], Callable[..., Any]],
    ) -> None:  # fmt: skip
        self.module, self.before, self.after, self.steps = module, before, after, steps
        self.thread = threading.local()

    def install(self) -> list[Any]:
        before, after = (
            traceable(hook, step) for hook, step in zip((self._before, self._after), self.steps)
        )
        handles = [self.module.register_forward_pre_hook(before, with_kwargs=True)]
        if self.after is not None:
            handles.append(self.module.register_forward_hook(after))
        return handles

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return None if self._inside else self.before(module, args, kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        assert self.after is not None
        return None if self._inside else self.after(module, args, output)

    @property
    def _inside(self) -> bool:
        return getattr(self.thread, "inside", False)

    def enter(self) -> None:
        """Before a forward of the decoder."""
        if HOOKS_IN_CHECKPOINT and is_checkpointed(self.module):
            function = getattr(self.module, _FUNCTION)
            if not isinstance(function, _Around):
                self.module.__dict__[_FUNCTION] = _Around(self, function)

    def leave(self) -> None:
        """After it, however it ended."""
        around = self.module.__dict__.get(_FUNCTION)
        if isinstance(around, _Around) and around.hooks is self:
            self.module.__dict__[_FUNCTION] = around.function


class _Around:
    """A layer's checkpoint function with the hooks of the layer around it."""

    def __init__(self, hooks: LayerHooks, function: Callable[..., Any]) -> None:
        self.hooks, self.function = hooks, function

    def __call__(self, run: Any, *args: Any) -> Any:
        hooks = self.hooks
        changed = hooks.before(hooks.module, args, dict(run.keywords))
        if changed is not None:
            args, kwargs = changed
            run = functools.partial(run.func, *run.args, **kwargs)
        hooks.thread.inside = True
        try:
            output = self.function(run, *args)
        finally:
            hooks.thread.inside = False
        if hooks.after is not None:
            after = hooks.after(hooks.module, args, output)
            output = output if after is None else after
        return output
