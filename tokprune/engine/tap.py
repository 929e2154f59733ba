"""A tap on attention: the q, k and v that the backend is given, without a second projection.

While a tapped module runs, its config names our attention function; that function restores the
backend's name, runs the backend unchanged and hands q, k and v to the tap. So the config differs
from the user's only inside that one call, and the backend's own masks, kernels and special cases
stay in force.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface

NAME = "tokprune_tap"

#: (module, query, key, value, attention_mask, scaling) of a tapped call
TapFunction = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, float], None]


class _Active(threading.local):
    """The tapped call of this thread: module → (backend name, tap)."""

    def __init__(self) -> None:
        self.calls: dict[int, tuple[str, TapFunction]] = {}


_active = _Active()


def _backend_function(module: Any, name: str) -> Callable[..., Any]:
    if name == "eager":
        # Eager attention is a plain function of each modeling file, in no registry.
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return AttentionInterface()[name]  # type: ignore[no-any-return]


def _tapped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    name, tap = _active.calls[id(module)]
    module.config._attn_implementation_internal = name
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    result = _backend_function(module, name)(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    tap(module, query, key, value, attention_mask, scale)
    return result


def install_tap(
    module: nn.Module, tap: TapFunction, wanted: Callable[[], bool]
) -> list[RemovableHandle]:
    """Call ``tap`` in every forward of an attention module during which ``wanted()`` is true."""
    if NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(NAME, _tapped_attention)

    def before(module: Any, args: Any) -> None:
        if wanted():
            name = module.config._attn_implementation
            _active.calls[id(module)] = (name, tap)
            module.config._attn_implementation_internal = NAME

    def after(module: Any, args: Any, output: Any) -> None:
        call = _active.calls.pop(id(module), None)
        if call is not None and module.config._attn_implementation_internal == NAME:
            module.config._attn_implementation_internal = call[0]

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]
