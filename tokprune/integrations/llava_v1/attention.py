"""Attention modules of transformers 4.36 and 4.37: they look their rotary embeddings up in tables
of their own, and know no registry of attention functions that a tap could join."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokprune.engine.layer_calls import rotate
from tokprune.engine.tap import TapFunction


class RotaryTables:
    """The tables of a layer's ``rotary_emb`` as a function of positions, like the module of newer
    releases: (hidden, positions [B, L]) → cos and sin [B, L, d] in the dtype of ``hidden``."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        # asks for all there is; the hook of longer_tables asks for more where that is needed
        cos, sin = self.module(hidden, seq_len=self.module.max_seq_len_cached)
        positions = positions.to(cos.device)
        return cos[positions].to(hidden.device), sin[positions].to(hidden.device)


def longer_tables(module: Any, length: Callable[[], int]) -> RemovableHandle:
    """Make a ``rotary_emb`` give at least ``length()`` entries: a layer asks for as many as it has
    keys, but tokens that outlived others may stand at positions beyond that."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["seq_len"] = max(kwargs["seq_len"], length())
        return args, kwargs

    return module.register_forward_pre_hook(hook, with_kwargs=True)  # type: ignore[no-any-return]


class ProjectionTap:
    """A tap that reads q, k and v off the projections of an attention module.

    Nothing is projected twice. Queries and, without a cache, keys are rotated again for the tap;
    with a cache, keys and values are the cached ones, earlier turns included.
    """

    def __init__(
        self, module: Any, function: TapFunction, wanted: Callable[[], bool], rotary: Any = None
    ) -> None:
        self.function, self.wanted, self.rotary = function, wanted, rotary
        self.seen = threading.local()
        self.handles = [
            module.register_forward_hook(self._after, with_kwargs=True),
            *(
                getattr(module, f"{name}_proj").register_forward_hook(self._projection(name))
                for name in "qkv"
            ),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _projection(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self.wanted():
                setattr(self.seen, name, output)

        return hook

    def _after(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self.wanted():
            return
        d = module.head_dim
        q, k, v = (
            x.view(*x.shape[:2], -1, d).transpose(1, 2)
            for x in (self.seen.q, self.seen.k, self.seen.v)
        )
        self.seen.__dict__.clear()
        if self.rotary is not None:
            cos, sin = self.rotary(q, kwargs["position_ids"])
            q = rotate(q, cos, sin)
            cache = kwargs.get("past_key_value")
            if cache is None:
                k = rotate(k, cos, sin)
            else:
                layer = cache.layers[module.layer_idx]
                k, v = layer.keys, layer.values
        scale = getattr(module, "scale", d**-0.5)
        self.function(module, q, k, v, kwargs.get("attention_mask"), scale)
