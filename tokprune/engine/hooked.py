"""Which modules of a model have hooks of ours on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def hooked(model: nn.Module, handles: Iterable[Any]) -> dict[nn.Module, set[int]]:
    """The modules that ``handles`` of torch's hooks belong to (other handles are passed over), and
    the numbers of these hooks."""
    numbers: dict[int, set[int]] = {}  # by the dict that they are in
    for handle in (h for own in handles for h in getattr(own, "handles", (own,))):
        if hasattr(handle, "hooks_dict_ref"):
            numbers.setdefault(id(handle.hooks_dict_ref()), set()).add(handle.id)
    found = {}
    for module in model.modules():
        places = (module._forward_pre_hooks, module._forward_hooks)
        if own := set[int]().union(*(numbers.get(id(place), ()) for place in places)):
            found[module] = own
    return found
