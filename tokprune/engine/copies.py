"""Copies of patched modules: deep ones are bare, and nothing patched is pickled.

What a patch puts on a module (hooks, attributes that stand before methods) works for that module
and its session. So a deep copy of the module is made without it, wherever in a larger copy the
module is met; and whoever owns the patch may put a new one on the copy. A shallow copy shares the
module's children with it, and the hooks, too.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from tokprune.errors import AlreadyPatchedError, UnsupportedModelError

#: where torch keeps hooks by number, and what it knows of them
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
#: how ``copy`` and ``pickle`` ask an object, before they ask its class
_ASKED = ("__deepcopy__", "__reduce_ex__")
#: stands for what is left out, until it is
_GONE = "left out"


class Guard:
    """Answers ``copy`` and ``pickle`` for one module, for as long as something is on it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        #: numbers of hooks, and names of attributes, that no copy takes along
        self.hooks: set[int] = set()
        self.names: Counter[str] = Counter()
        #: called with every deep copy
        self.copied: Callable[[nn.Module], object] | None = None

    @classmethod
    def of(cls, module: nn.Module) -> Guard:
        """The guard of a module, put there if there is none."""
        known = getattr(module.__dict__.get("__deepcopy__"), "__self__", None)
        if isinstance(known, Guard) and known.module is module:
            return known
        guard = cls(module)
        module.__dict__.update(__deepcopy__=guard.deepcopy, __reduce_ex__=guard.reduce)
        return guard

    def release(self, hooks: Iterable[int], names: Iterable[str]) -> None:
        """These are gone; so is the guard, if they were all."""
        self.hooks.difference_update(hooks)
        self.names -= Counter(names)
        if not self.on:
            for name in _ASKED:
                self.module.__dict__.pop(name, None)

    @property
    def on(self) -> bool:
        """Whether there is anything left to guard: shallow copies may keep a guard for longer."""
        return bool(self.hooks or self.names or self.copied)

    def bare(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """A module's attributes without those that a patch put there."""
        found = {n: v for n, v in attributes.items() if n not in self.names and n not in _ASKED}
        for name in _HOOKS:
            if self.hooks & found[name].keys():
                kept = ((n, hook) for n, hook in found[name].items() if n not in self.hooks)
                found[name] = type(found[name])(kept)
        return found

    def deepcopy(self, memo: dict[int, Any]) -> nn.Module:
        module = self.module
        cls: Any = type(module)
        if hasattr(cls, "__deepcopy__"):  # parametrised modules, FSDP
            memo.update((id(value), _GONE) for value in self._values())
            made: nn.Module = cls.__deepcopy__(module, memo)
            made.__dict__ = self.bare(made.__dict__)
        else:
            make, args, state, *_ = cls.__reduce_ex__(module, 4)
            made = memo[id(module)] = make(*args)
            made.__setstate__(copy.deepcopy(self.bare(state), memo))
        if self.copied is not None:
            self.copied(made)
        return made

    def _values(self) -> Iterator[Any]:
        """All that the patch put on the module."""
        known = self.module.__dict__
        yield from (known[name] for name in {*self.names, *_ASKED} & known.keys())
        for name in _HOOKS:
            yield from (hook for n, hook in known[name].items() if n in self.hooks)

    def reduce(self, protocol: Any) -> tuple[Any, ...]:
        cls: Any = type(self.module)
        make, args, state, *more = cls.__reduce_ex__(self.module, protocol)
        return make, args, _State(state) if self.on else self.bare(state), *more


class _State(dict[str, Any]):
    """A patched module's attributes, for shallow copies alone."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AlreadyPatchedError(
            "a model patched by tokprune cannot be pickled (torch.save, multiprocessing, joblib): "
            "its hooks belong to this process. Call tokprune.unpatch(model) first and patch again "
            "where it is loaded, or save model.state_dict()"
        )


class Guards:
    """The guards of all modules that a patch puts something on, from here to :meth:`release`.

    Args:
        model: holds the modules.
        hooks: numbers of torch's hooks on them.
        names: attributes put on them.
        copied: called with every deep copy of ``model`` as a whole.
    """

    def __init__(
        self, model: nn.Module, hooks: Mapping[nn.Module, set[int]],
        names: Mapping[nn.Module, tuple[str, ...]],
        copied: Callable[[nn.Module], object] | None,
    ) -> None:  # fmt: skip
        self._on: list[tuple[Guard, set[int], tuple[str, ...]]] = []
        self._model = Guard.of(model)
        self._model.copied = copied
        for module in dict.fromkeys((*hooks, *names)):
            guard, own, named = Guard.of(module), hooks.get(module, set()), names.get(module, ())
            guard.hooks |= own
            guard.names.update(named)
            self._on.append((guard, own, named))

    def release(self) -> None:
        for guard, hooks, names in self._on:
            guard.release(hooks, names)
        self._model.copied = None
        self._model.release((), ())


def refuse_replica(module: Any) -> None:
    """Before a forward.

    Raises:
        UnsupportedModelError: the module is one of the copies that ``DataParallel`` makes for every
            forward. They share the hooks of the model, which act on its own modules and device.
    """
    if getattr(module, "_is_replica", False):
        raise UnsupportedModelError(
            "torch.nn.DataParallel over several devices runs copies of the model, with which a "
            "model patched by tokprune cannot work; use DistributedDataParallel (torchrun, "
            "accelerate launch), or DataParallel(model, device_ids=[0])"
        )
