"""Bytes of live tensors while something runs, whatever device they are on (meta too)."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Counts the storage that operations inside the block make; ``peak``: the most that was alive
    at once. What was there before, weights and inputs, does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tree_map_only(Tensor, self._there_before, (args, kwargs))
        made = func(*args, **kwargs)
        tree_map_only(Tensor, self._made, made)
        return made

    def _there_before(self, tensor: Tensor) -> None:
        self._known.setdefault(tensor.untyped_storage(), 0)

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size
