"""Attention modules of transformers 4.36 and 4.37: they look their rotary embeddings up in tables
of their own, and know no registry of attention functions that a tap could join."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokprune.engine.masks import backend_of
from tokprune.engine.tap import Call, TapFunction


def window_of(module: Any) -> int | None:
    """Tokens that the sliding window of an attention module spans; None where it sees all, as under
    sdpa, whose masks leave the window out. A model of 4.37 keeps the backend it was built with."""
    return None if backend_of(module) == "sdpa" else getattr(module.config, "sliding_window", None)


def attention_call(module: Any, q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> Call:
    """What an attention module called with ``kwargs`` makes of its projections [B, L, H · d]; with
    a cache, keys and values are the cached ones, earlier turns included."""
    d, tables = module.head_dim, None
    q, k, v = (x.view(*x.shape[:2], -1, d).transpose(1, 2) for x in (q, k, v))
    if hasattr(module, "rotary_emb"):  # not in a tower
        tables = cos, sin = _rotary(module.rotary_emb, q, kwargs["position_ids"])
        q = _rotate(q, cos, sin)
        if (cache := kwargs.get("past_key_value")) is None:
            k = _rotate(k, cos, sin)
        else:
            layer = cache.layers[module.layer_idx]
            k, v = layer.keys, layer.values
    return Call(
        q, k, v, kwargs.get("attention_mask"), getattr(module, "scale", d**-0.5),
        window_of(module), rotary=tables,
    )  # fmt: skip


def _rotary(module: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, L, d] that a layer's ``rotary_emb`` has for these positions [B, L]."""
    # asks for all there is; the hook of longer_tables asks for more where that is needed
    cos, sin = module(hidden, seq_len=module.max_seq_len_cached)
    positions = positions.to(cos.device)
    return cos[positions].to(hidden.device), sin[positions].to(hidden.device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, H, L, d] in the half-split convention; cos, sin [B, L, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def longer_tables(module: Any, length: Callable[[], int]) -> RemovableHandle:
    """Make a ``rotary_emb`` give at least ``length()`` entries: a layer asks for as many as it has
    keys, but tokens that outlived others may stand at positions beyond that."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["seq_len"] = max(kwargs["seq_len"], length())
        return args, kwargs

    return module.register_forward_pre_hook(hook, with_kwargs=True)  # type: ignore[no-any-return]


class ProjectionTap:
    """A tap that reads q, k and v off the projections of an attention module: nothing is projected
    twice."""

    def __init__(self, module: Any, function: TapFunction, wanted: Callable[[], bool]) -> None:
        self.function, self.wanted = function, wanted
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
        if self.wanted():
            call = attention_call(module, self.seen.q, self.seen.k, self.seen.v, kwargs)
            self.seen.__dict__.clear()
            with torch.no_grad():  # scores need no gradient
                self.function(call)
